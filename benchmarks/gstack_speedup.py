"""How much compute does stacking save? 12 blocks of d 512 on Python source, grown by Gstack and from scratch.

    python benchmarks/gstack_speedup.py search                 tunes both arms at 60M and 120M tokens' worth of FLOPs
    python benchmarks/gstack_speedup.py final                  three seeds at up to 300M, with what it has found
    python benchmarks/gstack_speedup.py growth                 one of the searches, or of the final runs
    python benchmarks/gstack_speedup.py search final --smoke   tiny, also on a CPU: does it all work?

Speedup is FLOPs_scratch / FLOPs_grown - 1 at equal validation loss (arXiv 2405.15319), base and LM head counted, read
in two ways: (a) undecayed, as the paper does: both arms at a constant learning rate, at the lowest loss that both came
down to; (b) decayed: both arms at the ends of several budgets, each with its learning rate decayed over the last 20 %.

The search: the control's learning rate, batch and warmup on grids; rates to grow at, by Optuna and stopped early where
they lag; when and by how much to grow, growth in two steps, and in width and then depth, on grids. The final runs,
on seeds that the search has not used: the winner and the control at large budgets, and at the search's own the winner
beside growth when the published formula says, and beside stacking a random base (d = 0).
Cost: 60M tokens of the target take about 65 s of an H200. The search takes 50 minutes, the final runs 45.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
from common import write_results
from growth_search import Bench

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from raygrow.report.estimate import estimate, interval, percents
from raygrow.report.plots import STYLE
from raygrow.report.search import Contest, Setting, is_search, load_search
from raygrow.report.search_savings import decayed_speedup, speedup

PLOT = Path(__file__).with_suffix(".png")
COLORS = {"grown": "#3d7ff0", "from scratch": "#e27a00"}
DECAY, DECAY_KEY = 0.2, "train.schedule.decay"

GSTACK = ["plan=gstack"]
SCRATCH = ["plan=scratch"]
BASE, STACKED, AGAIN = "plan.phases.base", "plan.phases.stacked", "plan.phases.again"
LATE = [*GSTACK, f"{BASE}.lr=1.5e-3", f"{STACKED}.lr=8e-4"]
TWICE = [*GSTACK, f"{BASE}.lr=1.5e-3", f"{STACKED}.lr=1.5e-3", f"{STACKED}.growth.factor=2"]
TWICE += [f"{AGAIN}.growth.operator=gstack", f"{AGAIN}.growth.factor=2", f"{AGAIN}.lr=8e-4"]
WIDE = [*GSTACK, f"{BASE}.lr=1.5e-3", f"{STACKED}.lr=1.5e-3", f"{STACKED}.growth.operator=width"]
WIDE += [f"{STACKED}.growth.factor=2", f"{STACKED}.growth.noise_snr_db=10"]
WIDE += [f"{AGAIN}.growth.operator=gstack", f"{AGAIN}.growth.factor=4", f"{AGAIN}.lr=8e-4"]
EARLY, LONG = "plan.tokens=60e6", "plan.tokens=120e6"
SEARCHES = {
    "scratch": [*SCRATCH, EARLY],
    "warmup": [*SCRATCH, EARLY],
    "rates": [*GSTACK, EARLY],
    "growth": [*LATE, LONG],
    "twice": [*TWICE, LONG],
    "wide": [*WIDE, LONG],
}
"""Each a space of the same name in `spaces/`."""


def tokens_and_seeds(tokens: str, decays: str, seeds: str) -> str:
    """A space of budgets."""
    return f"space.space={{plan.tokens:{{grid:[{tokens}]}},{DECAY_KEY}:{{grid:[{decays}]}},seed:{{grid:[{seeds}]}}}}"


AT_LENGTH = ["train.evaluate_every=250"]
SCRATCH_BUDGETS = tokens_and_seeds("120e6,240e6,300e6", "0.0,0.2", "1,2,3")
GROWN_BUDGETS = tokens_and_seeds("160e6,240e6", "0.0,0.2", "1,2,3")
"""Less than from scratch: these runs end where the control's loss is about reached."""
LONGER = 200 / 120
"""Of the grown runs' budgets, halfway, to the search's: their bases are as much longer."""
AT_THE_SEARCH = tokens_and_seeds("120e6", "0.2", "1")
UNSEEN = ("grown", "formula", "random")
FINALS = ("final-scratch", "final-grown", *(f"unseen-{arm}" for arm in UNSEEN))
SMOKE_SPACE = tokens_and_seeds("30e3,40e3", "0.0,0.2", "0,1")


def final_plan(name: str, folder: Path) -> list[str]:
    """What a final run is told, with what the search has found best.

    Raises:
        SystemExit: If it has found nothing yet.
    """
    if name == "final-scratch":
        return [*SCRATCH, *AT_LENGTH, "train.optimizer.lr=6e-4", SCRATCH_BUDGETS]
    searched = folder / "growth"
    contest = load_search([searched]).contest if is_search(searched) else None
    best = contest.best if contest else None
    if not best or not best.base:
        raise SystemExit(f"{name} takes what `growth` has found, and {searched} has no finished trial: run that first")
    factor = f"{STACKED}.growth.factor"
    words, share = [*LATE, f"{factor}={best.values[factor]}"], f"{BASE}.share"
    return {
        "final-grown": [
            *words, *AT_LENGTH, f"{share}=null", f"{BASE}.tokens={best.base[1] * LONGER:.3g}", GROWN_BUDGETS
        ],
        "unseen-grown": [*words, f"{share}={best.values[share]}", AT_THE_SEARCH],
        "unseen-formula": [*words, "space.formula=true", "space.search=optuna", "space.samples=0", AT_THE_SEARCH],
        "unseen-random": [*words, f"{share}=null", f"{BASE}.steps=1", f"{BASE}.lr=1e-12", AT_THE_SEARCH],
    }[name]  # fmt: skip


def main() -> None:
    """Runs the stages asked for, or what is left of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = ["search", "final", *SEARCHES, *FINALS]
    parser.add_argument("stages", nargs="+", choices=stages, metavar="STAGE", help=", ".join(stages))
    parser.add_argument("--per-gpu", type=int, default=1, help="trials that share a GPU; seconds compare at 1 only")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "growth_search")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    bench = Bench(arguments.folder, smoke=arguments.smoke, per_gpu=arguments.per_gpu)
    bench.prepare()
    for name, plan in SEARCHES.items():
        if {name, "search"} & {*arguments.stages}:
            small = ["plan.tokens=40e3", "space.samples=4"] if arguments.smoke else []
            print_best(bench.search(name, name, *plan, *small))
    folders: dict[str, Path] = {}
    for name in FINALS:
        if {name, "final"} & {*arguments.stages}:
            small = [SMOKE_SPACE, "train.evaluate_every=10"] if arguments.smoke else []
            folders[name] = bench.search(name, "budgets", *final_plan(name, bench.folder), *small)
    if "final" in arguments.stages:
        report_finals(folders, bench, smoke=arguments.smoke)


def print_best(folder: Path) -> None:
    """The best settings of a search, each budget and decay by itself."""
    for contest in load_search([folder]).contests:
        ranked = sorted((loss.mean, str(s.values)) for s in contest.settings if (loss := s.loss))
        print(f"{folder.name}, {contest.flops:.3g} FLOPs, of {len(contest.settings)} settings:")
        for loss, values in ranked[:8]:
            print(f"  {loss:.4f}  {values}")


def report_finals(folders: dict[str, Path], bench: Bench, *, smoke: bool) -> None:
    """Prints the table and both speedups; writes the results and the plot."""
    both = load_search([folders["final-scratch"], folders["final-grown"]])
    constant, decayed = ([with_decay(contest, decay) for contest in both.contests] for decay in (0.0, DECAY))
    rows = [row(contest, setting) for contest in (*constant, *decayed) for setting in contest.settings]
    for arm in UNSEEN:
        contests = load_search([folders[f"unseen-{arm}"]]).contests
        rows += [row(contest, setting) | {"arm": arm} for contest in contests for setting in contest.settings]
    readings = [undecayed_reading(constant)]
    readings.append({"reading": "decayed", "speedup": percents(decayed_speedup(decayed))})
    print_tables(rows, readings)
    draw(constant, decayed, bench.folder / PLOT.name if smoke else PLOT)
    if not smoke:
        content = {"rows": rows, "readings": readings, "commands": bench.commands}
        print(f"written to {write_results('gstack_speedup', content)}")


def with_decay(contest: Contest, decay: float) -> Contest:
    """The settings of a contest that decay alike."""
    return replace(contest, settings=tuple(s for s in contest.settings if s.values[DECAY_KEY] == decay))


def row(contest: Contest, setting: Setting) -> dict[str, Any]:
    """How the trials of a setting ended."""
    ends = {seed: trial.val_loss for seed, trial in setting.finished.items()}
    return {
        "arm": "scratch" if setting.is_control else "grown",
        "flops": contest.flops,
        "decay": setting.values[DECAY_KEY],
        "base_share": contest.share(setting),
        "val_loss": ends,
        "seconds": {seed: trial.run and trial.run.last("seconds") for seed, trial in setting.finished.items()},
    }


def undecayed_reading(constant: list[Contest]) -> dict[str, Any]:
    """Speedup of each arm's longest runs at a constant learning rate, in FLOPs and in seconds."""
    grown, scratch = longest(constant)
    in_flops, in_seconds = (speedup(grown, scratch, of=of) for of in (lambda c: c.reached, lambda c: c.reached_seconds))
    return {"reading": "undecayed", "speedup": percents(in_flops), "in seconds": percents(in_seconds)}


def longest(constant: list[Contest]) -> tuple[Setting, Setting]:
    """The grown arm and the control at the largest budget that each has."""
    grown, scratch = [c.best for c in constant if c.best], [c.control for c in constant if c.control]
    return max(grown, key=lambda s: s.flops), max(scratch, key=lambda s: s.flops)


def print_tables(rows: list[dict[str, Any]], readings: list[dict[str, Any]]) -> None:
    """Every arm at every budget, then the speedups."""
    print(f"{'arm':<13}{'FLOPs':>10}{'decay':>7}{'base':>7}{'val loss':>18}  seeds")
    for line in sorted(rows, key=lambda line: (line["decay"], line["flops"], line["arm"])):
        losses = list(line["val_loss"].values())
        share = f"{line['base_share']:.0%}" if line["base_share"] else ""
        arm = f"{line['arm']:<13}{line['flops']:>10.2e}{line['decay']:>7}{share:>7}"
        print(f"{arm}{interval(estimate(losses)):>18}  {' '.join(f'{loss:.4f}' for loss in losses)}")
    for reading in readings:
        print(", ".join(f"{key} {value}" for key, value in reading.items()))


def draw(constant: list[Contest], decayed: list[Contest], file: Path) -> None:
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
