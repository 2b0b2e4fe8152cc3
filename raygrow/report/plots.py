"""Figures of a report: loss against FLOPs, its end in close-up with the speedup, and throughput.

Each panel draws on axes that it is given, so that the same panel serves the PNG (side by side, on white) and the HTML
page (one below the other, as SVG whose ink follows the page's light or dark colours).
"""

import io
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on a training machine

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from raygrow.report import units
from raygrow.report.compare import Comparison, Curve, compare_runs, fair, validation_curve
from raygrow.report.runs import Run
from raygrow.weights.atomic import replace_file

INK = "#454a53"
GROWN = ("#3d7ff0", "#0fa37f", "#a06af0", "#d4488e")
SCRATCH = ("#e27a00", "#a3740a")
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "lines.linewidth": 1.9,
    "svg.fonttype": "none",
    "svg.hashsalt": "raygrow",  # the same runs give the same file
}
CLOSE_UP = 0.35
"""The close-up starts at this share of the longest run's FLOPs."""

MAX_POINTS = 500
"""Points drawn of one line of per-step metrics; more are averaged in groups."""

Drawing = Callable[[Axes], None]


def draw_loss(axes: Axes, runs: list[Run]) -> None:
    """Training (thin) and validation loss of every run against FLOPs, on a logarithmic axis."""
    colors = run_colors(runs)
    for run in runs:
        flops, loss = thinned(*run.columns("flops", "loss"))
        curve = validation_curve(run, "flops")
        label = run.name if curve is None else None
        axes.plot(flops, loss, color=colors[run.name], alpha=0.45, linewidth=1, label=label)
        if curve is not None:
            axes.plot(curve.cost, curve.loss, color=colors[run.name], label=run.name)
            axes.plot(curve.cost[-1:], curve.loss[-1:], "o", color=colors[run.name], markersize=5)
        for phase in run.phases:
            after = run.growths.get(phase.name, {}).get("loss_after")
            if after is not None:
                axes.plot(phase.start_flops, after, "o", color=colors[run.name], fillstyle="none", markersize=6)
    axes.set_xscale("log")
    mark_phases(axes, runs, "start_flops")
    axes.set(title="Loss", xlabel="training FLOPs, base included", ylabel="nats per token")
    axes.legend(loc="upper right", title="validation (thin: training, rings: after growth)")


def draw_close_up(axes: Axes, runs: list[Run]) -> None:
    """Validation loss over the later part of the runs, with the speedup at equal loss as an arrow."""
    colors = run_colors(runs)
    curves = {run.name: curve for run in runs if (curve := validation_curve(run, "flops")) is not None}
    end = max(curve.end for curve in curves.values())
    seen = np.concatenate([_after(curve, CLOSE_UP * end) for curve in curves.values()])
    low, high = seen.min(), seen.max()
    margin = max(0.1 * (high - low), 1e-3)
    for name, curve in curves.items():
        axes.plot(curve.cost, curve.loss, "-o", color=colors[name], markersize=3)
        axes.annotate(
            units.number(float(curve.loss[-1])),
            (curve.cost[-1], curve.loss[-1]),
            xytext=(7, 0),
            textcoords="offset points",
            color=colors[name],
            va="center",
            fontweight="bold",
        )
    axes.set(xlim=(CLOSE_UP * end, 1.09 * end), ylim=(low - margin, high + margin))
    for line, comparison in enumerate(fair(compare_runs(runs))):
        _draw_speedup(axes, comparison, colors[comparison.grown], line)
    mark_phases(axes, runs, "start_flops")
    axes.set(title="The end, close up", xlabel="training FLOPs", ylabel="validation, nats per token")


def draw_throughput(axes: Axes, runs: list[Run]) -> None:
    """Tokens per second over training time."""
    colors = run_colors(runs)
    longest = max(run.last("seconds") or 0.0 for run in runs)
    unit, size = ("hours", 3600) if longest > 7200 else ("minutes", 60) if longest > 120 else ("seconds", 1)
    for run in runs:
        seconds, speed = thinned(*run.columns("seconds", "tokens_per_second"))
        axes.plot(seconds / size, speed, color=colors[run.name], label=run.name)
    axes.set_ylim(bottom=0)
    mark_phases(axes, runs, "start_seconds", size)
    axes.yaxis.set_major_formatter(lambda value, _: units.count(value))
    axes.set(title="Throughput", xlabel=f"training time, {unit}", ylabel="tokens per second")
    if len(runs) > 1:
        axes.legend(loc="lower right")


def draw_learning_rate(axes: Axes, runs: list[Run]) -> None:
    """Learning rate against FLOPs: warmup, re-warmup after growth, decay."""
    colors = run_colors(runs)
    for run in runs:
        axes.plot(*thinned(*run.columns("flops", "lr")), color=colors[run.name], label=run.name)
    axes.set_ylim(bottom=0)
    mark_phases(axes, runs, "start_flops")
    axes.set(title="Learning rate", xlabel="training FLOPs", ylabel="learning rate")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def draw_divergence(axes: Axes, runs: list[Run]) -> None:
    """How far the copies that growth made of heads (solid) and experts (dashed) have come apart."""
    _draw_pair(axes, runs, {"heads": "head_divergence", "experts": "expert_divergence"})
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    mark_phases(axes, runs, "start_flops")
    axes.set(title="Copies come apart", xlabel="training FLOPs", ylabel="0 the same, 1 unrelated")


def draw_expert_load(axes: Axes, runs: list[Run]) -> None:
    """Use of the most (solid) and the least used expert (dashed) of any Block."""
    _draw_pair(axes, runs, {"most used": "expert_load_max", "least used": "expert_load_min"})
    axes.axhline(1, color=INK, linewidth=1, linestyle=":")
    axes.set_ylim(bottom=0)
    mark_phases(axes, runs, "start_flops")
    axes.set(title="Expert load", xlabel="training FLOPs", ylabel="tokens, relative to an even share")


def mark_phases(axes: Axes, runs: list[Run], start: str, size: float = 1.0) -> None:
    """A dotted line where a run went into its next phase, with the phase's name; `size` divides its place."""
    colors = run_colors(runs)
    for run in runs:
        for phase in run.phases[1:]:
            place = getattr(phase, start) / size
            left, right = axes.get_xlim()
            axes.axvline(place, color=colors[run.name], linestyle=":", linewidth=1.2)
            if left < place < right:
                axes.annotate(
                    phase.name,
                    (place, 0.03),
                    xycoords=("data", "axes fraction"),
                    xytext=(-4, 0),
                    textcoords="offset points",
                    ha="right",
                    va="bottom",
                    rotation=90,
                    color=colors[run.name],
                    fontsize=9,
                )


def panels(runs: list[Run]) -> dict[str, Drawing]:
    """The panels that the runs have data for, by name."""
    if not runs:
        return {}
    evaluated = any(validation_curve(run, "flops") is not None for run in runs)
    found = {metric for run in runs for line in run.history for metric in line}
    drawn = [
        draw_loss,
        *([draw_close_up] if evaluated else []),
        draw_throughput,
        draw_learning_rate,
        *([draw_divergence] if found & {"head_divergence", "expert_divergence"} else []),
        *([draw_expert_load] if "expert_load_max" in found else []),
    ]
    return {draw.__name__: partial(draw, runs=runs) for draw in drawn}


def write_png(runs: list[Run], file: Path) -> None:
    """Loss against FLOPs and its close-up side by side."""
    found = panels(runs)
    write_panels([found[name] for name in ("draw_loss", "draw_close_up") if name in found], file)


def write_panels(drawings: Sequence[Drawing], file: Path) -> None:
    """Panels side by side as a PNG, 2080 pixels wide."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(drawings), figsize=(max(13, 6.5 * len(drawings)), 4.8), layout="constrained", squeeze=False
        )
        for draw, place in zip(drawings, axes[0], strict=True):
            draw(place)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=160, facecolor="white")
        plt.close(figure)
    replace_file(file, image.getvalue())


def svg(draw: Drawing, name: str) -> str:
    """One panel as an SVG element to put into a page, under a name of its own; its ink is the page's text colour."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.6, 4.4), layout="constrained")
        draw(axes)
        text = _svg_text(figure)
        plt.close(figure)
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' (width|height)="[^"]*pt"', "", text, count=2)  # the page decides the size
    # the page may hold several figures: their ids must differ
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", text)
    return text.replace(INK, "currentColor")


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A line of at most `MAX_POINTS` points: means of equal groups of neighbours."""
    size = -(-len(x) // MAX_POINTS)
    if size <= 1:
        return x, y
    starts = np.arange(0, len(x), size)
    counts = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def run_colors(runs: list[Run]) -> dict[str, str]:
    """A colour for every run, by name: one family for grown runs, one for those from scratch."""
    grown, scratch = 0, 0
    colors = {}
    for run in runs:
        if run.is_grown:
            colors[run.name], grown = GROWN[grown % len(GROWN)], grown + 1
        else:
            colors[run.name], scratch = SCRATCH[scratch % len(SCRATCH)], scratch + 1
    return colors


def _draw_pair(axes: Axes, runs: list[Run], metrics: dict[str, str]) -> None:
    """Two metrics of every run against FLOPs, the first solid, the second dashed."""
    colors = run_colors(runs)
    for run in runs:
        for (name, metric), style in zip(metrics.items(), ("-", "--"), strict=True):
            x, y = thinned(*run.columns("flops", metric))
            if len(x):
                label = name if len(runs) == 1 else f"{run.name}: {name}"
                axes.plot(x, y, style, color=colors[run.name], label=label)
    axes.legend(loc="best")


def _draw_speedup(axes: Axes, c: Comparison, color: str, line: int) -> None:
    """An arrow at the loss that both reached, from the scratch run's crossing to the grown one's; its size in words."""
    if c.reached.grown is None or c.reached.scratch is None:
        return
    grown, scratch = ((cost, c.reached.loss) for cost in (c.reached.grown, c.reached.scratch))
    axes.annotate("", grown, scratch, arrowprops={"arrowstyle": "->", "color": color, "linewidth": 1.6})
    said = f"{c.grown}: speedup {units.percent(c.reached.speedup, signed=True)} at {units.number(c.reached.loss)}"
    axes.annotate(
        said,
        (0.98, 0.97),
        xycoords="axes fraction",
        xytext=(0, -14 * line),
        textcoords="offset points",
        ha="right",
        va="top",
        color=color,
    )


def _after(curve: Curve, cost: float) -> np.ndarray:
    """Losses evaluated after a cost, with the last one whatever its cost."""
    return np.append(curve.loss[curve.cost >= cost], curve.loss[-1])


def _svg_text(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()
