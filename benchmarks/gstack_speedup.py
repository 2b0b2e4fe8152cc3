"""How much compute does stacking save? 12 blocks of d 512 on Python source, grown by Gstack and from scratch.

    python benchmarks/gstack_speedup.py search                 tunes both arms, at 60M to 200M tokens' worth of FLOPs
    python benchmarks/gstack_speedup.py final                  three seeds at up to 300M, with what it has found
    python benchmarks/gstack_speedup.py growth                 one of the searches, or of the final runs
    python benchmarks/gstack_speedup.py search final --smoke   tiny, also on a CPU: does it all work?

Speedup is FLOPs_scratch / FLOPs_grown - 1 at equal validation loss (arXiv 2405.15319), base and LM head counted, read
in two ways: (a) constant, as the paper does: both arms at a constant learning rate, at the lowest loss that both came
down to; (b) decayed: both arms at the ends of several budgets, each with its learning rate decayed over the last 20 %.

The search: the control's learning rate, batch and warmup on grids; rates to grow at early, by Optuna and stopped where
they lag; when and by how much to grow, growth in two steps, and in width and then depth, on grids; then, at length,
both arms' learning rates for either reading. The final runs, on seeds that the search has not used: each arm at the
learning rate that was best for a reading; and at the search's own budget the winner beside a base of a quarter of the
depth, stacked when the published formula says, and beside stacking a random one (d = 0).
Cost: 60M tokens of the target take about 65 s of an H200. The search takes 80 minutes, the final runs 70. Each stage
that has ended is kept in results/gstack_speedup/ and not run again: stages may run on several machines, one after the
other, that have the same packages installed. To run one again, remove its file and its folder.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from common import RESULTS, write_results
from growth_search import Bench
from gstack_stages import AT_LENGTH, DECAY_KEY, FINALS, READINGS, SEARCHES, best_of, stage_words

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from raygrow.report.estimate import estimate, interval, percents
from raygrow.report.plots import STYLE
from raygrow.report.search import Contest, Setting, load_search
from raygrow.report.search_savings import decayed_speedup, speedup

PLOT = Path(__file__).with_suffix(".png")
COLORS = {"grown": "#3d7ff0", "from scratch": "#e27a00"}


def main() -> None:
    """Runs the stages asked for, or what is left of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = ["search", "final", *SEARCHES, *AT_LENGTH, *FINALS]
    parser.add_argument("stages", nargs="+", choices=stages, metavar="STAGE", help=", ".join(stages))
    parser.add_argument("--per-gpu", type=int, default=1, help="trials that share a GPU; seconds compare at 1 only")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "growth_search")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    kept = RESULTS / "gstack_speedup"
    bench = Bench(arguments.folder, smoke=arguments.smoke, per_gpu=arguments.per_gpu, kept=kept)
    bench.restore()
    bench.prepare()
    for name, plan in SEARCHES.items():
        if {name, "search"} & {*arguments.stages}:
            small = ["plan.tokens=40e3", "space.samples=4"] if arguments.smoke else []
            print_best(bench.search(name, name, *plan, *small))
    for name in (*AT_LENGTH, *FINALS):
        if {name, "search" if name in AT_LENGTH else "final"} & {*arguments.stages}:
            words = stage_words(name, bench.folder, smoke=arguments.smoke)
            print_best(bench.search(name, "budgets", *words))
    if "final" in arguments.stages:
        report_finals(bench, smoke=arguments.smoke)


def print_best(folder: Path) -> None:
    """The best settings of a search, each budget by itself."""
    for contest in load_search([folder]).contests:
        print(f"{folder.name}, {contest.flops:.3g} FLOPs, of {len(contest.settings)} settings:")
        for loss, setting in best_of(contest)[:8]:
            print(f"  {loss:.4f}  {setting.values}")


def report_finals(bench: Bench, *, smoke: bool) -> None:
    """Prints the table and both speedups; writes the results and the plot."""
    folders = {name: bench.folder / name for name in FINALS}
    contests = {name: load_search([folder]).contests for name, folder in folders.items()}
    rows = [row(name, contest, s) for name, found in contests.items() for contest in found for s in contest.settings]
    constant, decayed = (
        load_search([folders[f"{reading}-scratch"], folders[f"{reading}-grown"]]).contests for reading in READINGS
    )
    readings = [constant_reading(constant)]
    readings.append({"reading": "decayed", "speedup": percents(decayed_speedup(decayed))})
    print_tables(rows, readings)
    draw(constant, decayed, bench.folder / PLOT.name if smoke else PLOT)
    if not smoke:
        content = {"rows": rows, "readings": readings, "prepare": bench.commands["prepare"], "stages": bench.origins}
        print(f"written to {write_results('gstack_speedup', content)}")


def row(name: str, contest: Contest, setting: Setting) -> dict[str, Any]:
    """How the trials of a setting ended."""
    ends = {seed: trial.val_loss for seed, trial in setting.finished.items()}
    return {
        "arm": name,
        "flops": contest.flops,
        "decay": setting.values[DECAY_KEY],
        "base_share": contest.share(setting),
        "val_loss": ends,
        "seconds": {seed: trial.run and trial.run.last("seconds") for seed, trial in setting.finished.items()},
    }


def constant_reading(constant: Sequence[Contest]) -> dict[str, Any]:
    """Speedup of each arm's longest runs at a constant learning rate, in FLOPs and in seconds."""
    grown, scratch = longest(constant)
    in_flops, in_seconds = (speedup(grown, scratch, of=of) for of in (lambda c: c.reached, lambda c: c.reached_seconds))
    return {"reading": "constant", "speedup": percents(in_flops), "in seconds": percents(in_seconds)}


def longest(constant: Sequence[Contest]) -> tuple[Setting, Setting]:
    """The grown arm and the control at the largest budget that each has."""
    grown, scratch = [c.best for c in constant if c.best], [c.control for c in constant if c.control]
    return max(grown, key=lambda s: s.flops), max(scratch, key=lambda s: s.flops)


def print_tables(rows: list[dict[str, Any]], readings: list[dict[str, Any]]) -> None:
    """Every arm at every budget, then the speedups."""
    print(f"{'arm':<17}{'FLOPs':>10}{'decay':>7}{'base':>7}{'val loss':>18}  seeds")
    for line in sorted(rows, key=lambda line: (line["decay"], line["flops"], line["arm"])):
        losses = list(line["val_loss"].values())
        share = f"{line['base_share']:.0%}" if line["base_share"] else ""
        arm = f"{line['arm']:<17}{line['flops']:>10.2e}{line['decay']:>7}{share:>7}"
        print(f"{arm}{interval(estimate(losses)):>18}  {' '.join(f'{loss:.4f}' for loss in losses)}")
    for reading in readings:
        print(", ".join(f"{key} {value}" for key, value in reading.items()))


def draw(constant: Sequence[Contest], decayed: Sequence[Contest], file: Path) -> None:
    """Validation loss against FLOPs: every seed's curve at a constant rate, and the decayed ends of the budgets."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
        for (arm, color), setting in zip(COLORS.items(), longest(constant), strict=True):
            for trial in setting.finished.values():
                assert trial.run, "a finished trial has a run folder"
                label = f"{arm}, constant rate, each seed" if trial is next(iter(setting.finished.values())) else None
                axes.plot(*trial.run.columns("flops", "val_loss"), color=color, linewidth=0.8, alpha=0.7, label=label)
            settings = [(c.flops, s) for c in decayed for s in c.settings if s.is_control == setting.is_control]
            losses = [(flops, loss.mean) for flops, s in settings if (loss := s.loss)]
            axes.plot(
                *zip(*losses, strict=True),
                "o-",
                color=color,
                markersize=5,
                label=f"{arm}, decayed at the end of each budget",
            )
        lowest = min(loss.mean for c in (*constant, *decayed) for s in c.settings if (loss := s.loss))
        axes.set(xscale="log", ylim=(lowest - 0.03, lowest + 0.6))
        axes.set(xlabel="training FLOPs, base and LM head included", ylabel="validation loss, nats per token")
        axes.set_title("12 blocks of d 512 on Python source")
        axes.legend(loc="upper right")
        figure.savefig(file, dpi=160)
        plt.close(figure)


if __name__ == "__main__":
    main()
