"""Figures of a search: loss and speedup over when to grow, and what each budget came to."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from raygrow.report import units
from raygrow.report.estimate import Estimate
from raygrow.report.plots import GROWN, INK, SCRATCH, Drawing, draw_close_up
from raygrow.report.runs import Run
from raygrow.report.search import Contest, Search, Setting
from raygrow.report.search_savings import speedup

COLORS = (*GROWN, "#7a8b00", "#8a5a44")
TIMING = (".share", ".tokens", ".flops", ".steps")
"""Ends of the keys of a phase that say when to grow."""
MILLION = 1e6
WIDE = 6.0
"""A range of positive values this many times its start is drawn on a logarithmic axis."""


@dataclass(frozen=True)
class Layout:
    """Where settings go in a figure: which value is across, which ones tell the lines apart."""

    label: str
    place: Callable[[Setting], float | None]
    line: Callable[[Setting], str]
    is_share: bool
    names: tuple[str, ...] = ()
    """Of the places 0, 1, ..., where what is across are words."""


def panels(search: Search) -> dict[str, Drawing]:
    """The panels that the search has trials for, by names of their own, the most telling first."""
    contest = search.contest
    if contest is None:
        return {}
    found: dict[str, Drawing] = {"losses": partial(draw_losses, contest=contest)}
    if contest.control:
        found["speedups"] = partial(draw_speedups, contest=contest)
    curves = _one_of_each(contest)
    if len(curves) == 2:
        found["curves"] = partial(draw_close_up, runs=curves)
    decided = [other for other in search.contests if other.best]
    if len(decided) > 1:
        found["budgets"] = partial(draw_budgets, contests=decided)
    found |= {f"losses{i}": partial(draw_losses, contest=c) for i, c in enumerate(decided) if c is not contest}
    return found


def _one_of_each(contest: Contest) -> list[Run]:
    """A run of the best setting and one from scratch, of the same seed where there are such."""
    best, control = contest.best, contest.control
    if not best or not control:
        return []
    seed = next((seed for seed in best.finished if seed in control.finished), None)
    trials = {
        name: setting.finished.get(seed) or next(iter(setting.finished.values()))
        for name, setting in (("best", best), ("scratch", control))
    }
    runs = [replace(trial.run, name=name) for name, trial in trials.items() if trial.run]
    return [run for run in runs if run.last("val_loss") is not None]


def draw_losses(axes: Axes, contest: Contest) -> None:
    """Validation loss of every finished setting, the formula's point, the best, and scratch, with intervals."""
    _draw_settings(axes, contest, lambda setting: setting.loss)
    control = contest.control.loss if contest.control else None
    if control:
        axes.axhline(control.mean, color=SCRATCH[0], linestyle="--", label="from scratch")
        if control.half:
            axes.axhspan(control.mean - control.half, control.mean + control.half, color=SCRATCH[0], alpha=0.13, lw=0)
    axes.set(title=f"Loss at the end, {units.flops(contest.flops)} FLOPs", ylabel="validation, nats per token")
    _legend(axes)


def draw_speedups(axes: Axes, contest: Contest) -> None:
    """Speedup over the control, at the loss that both reached."""
    control = contest.control
    if control is None:
        return
    _draw_settings(axes, contest, lambda setting: speedup(setting, control, of=lambda c: c.reached))
    axes.axhline(0, color=SCRATCH[0], linestyle="--", label="from scratch")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:+.0f} %" if value else "0 %")
    axes.set(title="Speedup at equal loss", ylabel="FLOPs from scratch / FLOPs grown - 1")
    _legend(axes)


def draw_budgets(axes: Axes, contests: Sequence[Contest]) -> None:
    """Loss at the end of each budget: the best setting's, with the formula's timing, and from scratch."""
    arms = (
        ("best", GROWN[0], lambda c: c.best),
        ("the formula's timing", GROWN[1], lambda c: c.formula),
        ("from scratch", SCRATCH[0], lambda c: c.control),
    )
    for name, color, arm in arms:
        ends = [(contest.flops, s.loss) for contest in contests if (s := arm(contest)) and s.loss]
        if ends:
            _draw_line(axes, ends, color, name)
    axes.set_xscale("log")
    axes.set_xticks([contest.flops for contest in contests], [units.flops(contest.flops) for contest in contests])
    axes.minorticks_off()
    axes.set(title="Loss at the end of each budget", xlabel="budget, FLOPs", ylabel="validation, nats per token")
    axes.legend(loc="best")


def layout(contest: Contest) -> Layout:
    """Timing across where it was searched, else the first value that was; the others tell the lines apart."""
    settings = contest.grown
    varying = [key for key in _keys(settings) if len({repr(s.values.get(key)) for s in settings}) > 1]
    timing = [key for key in varying if key.startswith("plan.phases.") and key.endswith(TIMING)]
    if timing or not varying:
        line = _line(settings, [key for key in varying if key not in timing])
        return Layout("share of the FLOPs before growth", contest.share, line, is_share=True)
    key, rest = varying[0], varying[1:]
    label = units.short_names(_keys(settings))[key]
    values = [setting.values.get(key) for setting in settings]
    if all(isinstance(value, int | float) for value in values):
        return Layout(label, lambda s: s.values.get(key), _line(settings, rest), is_share=False)
    names = tuple(dict.fromkeys(map(str, values)))
    return Layout(
        label, lambda s: float(names.index(str(s.values.get(key)))), _line(settings, rest), is_share=False, names=names
    )


def shown(value: Any) -> str:
    """A value of the space as text: numbers short."""
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < MILLION else f"{value:.4g}"
    return str(value)


def _keys(settings: Sequence[Setting]) -> list[str]:
    return list(dict.fromkeys(key for setting in settings for key in setting.values))


def _line(settings: Sequence[Setting], keys: Sequence[str]) -> Callable[[Setting], str]:
    """Names the line that a setting is a point of; empty for all where there would be too many lines to tell apart."""
    names = units.short_names(_keys(settings))

    def line(setting: Setting) -> str:
        return ", ".join(f"{names[key]} {shown(setting.values.get(key, units.DASH))}" for key in keys)

    return line if len({line(setting) for setting in settings}) <= len(COLORS) else lambda setting: ""


def _draw_settings(axes: Axes, contest: Contest, of: Callable[[Setting], Estimate | None]) -> None:
    where = layout(contest)
    placed = [(x, y, s) for s in contest.grown if (x := where.place(s)) is not None and (y := of(s)) is not None]
    placed.sort(key=lambda point: point[0])
    lines: dict[str, list[tuple[float, Estimate]]] = {}
    for x, y, setting in placed:
        lines.setdefault(where.line(setting), []).append((x, y))
    for (name, points), color in zip(sorted(lines.items()), itertools.cycle(COLORS), strict=False):
        joined = len({x for x, _ in points}) == len(points) and not where.names
        _draw_line(axes, points, color, name or "grown", style="-o" if joined and (name or len(lines) == 1) else "o")
    marks = ((contest.formula, "*", 15, "the formula's timing"), (contest.best, "o", 14, "best"))
    for marked, marker, size, name in marks:
        for x, y, setting in placed:
            if setting is marked:
                full = "full" if marker == "*" else "none"
                axes.plot(x, y.mean, marker, color=INK, markersize=size, fillstyle=full, label=name, linestyle="")
    _scale(axes, where, [x for x, _, _ in placed])


def _draw_line(
    axes: Axes, points: Sequence[tuple[float, Estimate]], color: str, name: str, *, style: str = "-o"
) -> None:
    """Means as a line, with a bar for each interval."""
    axes.plot([x for x, _ in points], [y.mean for _, y in points], style, color=color, markersize=5, label=name)
    sure = [(x, y.mean, y.half) for x, y in points if y.half is not None]
    if sure:
        x, y, half = zip(*sure, strict=True)
        axes.errorbar(x, y, yerr=half, fmt="none", ecolor=color, elinewidth=1.2, capsize=3, alpha=0.7)


def _legend(axes: Axes) -> None:
    """Below the axes, where it covers no interval."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, columnspacing=1.5)


def _logarithmic(axes: Axes, text: Callable[[float], str]) -> None:
    """A logarithmic axis that has ticks to read within a decade too."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(lambda value, _: text(value))


def _scale(axes: Axes, where: Layout, places: Sequence[float]) -> None:
    if where.names:
        axes.set_xticks(range(len(where.names)), where.names)
    elif places and min(places) > 0 and max(places) > WIDE * min(places):
        _logarithmic(axes, "{:g}".format)
    if where.is_share:
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.set_xlabel(where.label)
