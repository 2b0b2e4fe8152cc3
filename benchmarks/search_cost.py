"""What does searching cost, and does it find what trying everything finds?

    python benchmarks/search_cost.py                    everything: data, the search, the full grid, unseen seeds
    python benchmarks/search_cost.py --no-unseen-seed   without the last
    python benchmarks/search_cost.py --smoke            a grid of a minute: does it all work?

A grid of budget x timing x factor x seed of a tiny model on Python source, twice: searched with `raygrow tune`, whose
trials share bases and trunks and are stopped early, and in full, where every trial trains alone, from its first step to
its last, in a folder of its own. FLOPs are counted where they are trained, in both. Then the setting that the search
names for each budget, the full grid's second, the published formula's (clamped) and the final model from scratch train
on equal FLOPs with seeds that neither has used. As commands, beside the report of any search:
`raygrow train --config-dir <search>/best plan=best seed=7 control=true name=...`, and the same with `plan=formula`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from common import write_results

from raygrow.config import build
from raygrow.report.estimate import Estimate, estimate, interval
from raygrow.report.search import Contest, load_search
from raygrow.space import SpaceConfig
from raygrow.train.shared import history_of, spent_flops, train_segment
from raygrow.trials import Search, Trial

ROOT = Path(__file__).resolve().parents[1]
SPACE = ROOT / "benchmarks" / "spaces" / "search_cost.yaml"
DATA = ["data.tokenizer.vocab_size=1024"]
SETTINGS = [
    *("--config-name", "tune_quickstart", "model.d_model=48", "model.d_ff=128"),
    *("train.batch_size=4", "train.evaluate_every=20", "train.evaluate_sequences=64", "train.checkpoint_every=20"),
]
SMOKE = {"plan.tokens": [20e3, 40e3], "plan.phases.base.tokens": [5e3, 10e3], "seed": [0]}
UNSEEN = (100, 101, 102)
"""Seeds that the search does not use."""


def main() -> None:
    """Runs what is not there yet, then prints and writes the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    unseen = "train the searched setting, the formula's and scratch on seeds that the search has not used"
    parser.add_argument("--unseen-seed", action=argparse.BooleanOptionalAction, default=True, help=unseen)
    parser.add_argument("--processes", type=int, default=2, help="trials of the full grid at a time")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "search_cost")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve() / ("smoke" if arguments.smoke else "full")
    data = [*DATA, f"data.path={folder / 'data'}"]
    execute(["jobs/prepare_data.py", "--config-name", "quickstart", *data])
    space = write_smoke(folder / "smoke.yaml") if arguments.smoke else SPACE
    tune = ["jobs/tune.py", *SETTINGS, *data, f"space={space}", "name=search", f"storage_path={folder}"]
    execute(tune)
    search = read_search(folder / "search")
    with ProcessPoolExecutor(arguments.processes, get_context("spawn")) as pool:
        alone = train_all([[trial] for trial in search.fixed], folder / "alone", pool)
        command = shown(tune).replace(str(folder), "FOLDER").replace(f"{ROOT}/", "")
        result: dict[str, Any] = compare(search, alone, folder) | {"command_of_the_search": command}
        print_comparison(result)
        if arguments.unseen_seed:
            seconds = [row["second"] for row in result["budgets"]]
            seeds = UNSEEN[:1] if arguments.smoke else UNSEEN
            result["unseen_seeds"] = unseen_seeds(search, seconds, folder, pool, seeds=seeds)
            print_unseen(result["unseen_seeds"])
    if not arguments.smoke:
        print(f"written to {write_results('search_cost', result)}")


def write_smoke(file: Path) -> Path:
    """A small version of the space."""
    space = yaml.safe_load(SPACE.read_text())
    space["space"] |= {key: {"grid": values} for key, values in SMOKE.items()}
    file.write_text(yaml.safe_dump(space))
    return file


def execute(words: list[str]) -> None:
    """Runs one command of this repository."""
    print(shown(words), flush=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, check=True)


def shown(words: list[str]) -> str:
    """A command as one types it."""
    return " ".join(["python", *words])


def read_search(folder: Path) -> Search:
    """The trials of a search, from its folder."""
    settings = yaml.safe_load((folder / "search.yaml").read_text())
    return Search(settings["run"], build(SpaceConfig, settings["space"], "space"))


@dataclass(frozen=True)
class Trained:
    """How trials ended that were trained outside of a search."""

    losses: dict[str, float]
    """Validation loss at the end, by the trial's name."""
    spent: float
    """FLOPs, counted while they were trained."""
    flops: float
    """FLOPs that the trials have, each alone."""


def train_all(groups: Sequence[Sequence[Trial]], folder: Path, pool: ProcessPoolExecutor) -> Trained:
    """Trains groups of trials side by side, those of a group one after the other with shared work."""
    ended = pool.map(train_group, groups, [folder / group[0].name for group in groups])
    losses: dict[str, float] = {}
    for found in ended:
        losses |= found
    spent = sum(spent_flops(folder / group[0].name) for group in groups)
    return Trained(losses, spent, sum(trial.flops for group in groups for trial in group))


def train_group(trials: Sequence[Trial], states: Path) -> dict[str, float]:
    """Trains trials that may share their work; gives their last validation losses."""
    torch.set_num_threads(1)
    losses = {}
    for trial in trials:
        for segment in trial.segments:
            run = trial.run
            data = Path(run.data.path)
            outcome = train_segment(segment, run.train, states=states, data=data, seed=run.seed, device="cpu")
            assert outcome.status == "finished", outcome.reason
        losses[trial.name] = history_of(trial.segments, states)[-1]["val_loss"]
    return losses


@dataclass(frozen=True)
class Tried:
    """One setting at one budget, in the full grid."""

    values: dict[str, Any]
    losses: dict[int, float]
    """By seed."""

    @property
    def mean(self) -> float:
        return sum(self.losses.values()) / len(self.losses)

    def ahead_of(self, other: "Tried") -> Estimate:
        """Nats by which it is better, seed by seed."""
        found = estimate(other.losses[seed] - loss for seed, loss in self.losses.items())
        assert found
        return found


def compare(search: Search, alone: Trained, folder: Path) -> dict[str, Any]:
    """The search against the full grid: what each spent, and what each names as the best of every budget."""
    cost = json.loads((folder / "search" / "cost.json").read_text())
    rows = {row["name"]: row for row in json.loads((folder / "search" / "results.json").read_text())}
    differ = [abs(row["val_loss"] - alone.losses[name]) for name, row in rows.items() if row["status"] == "finished"]
    return {
        "trials": len(search.fixed),
        "stopped_early": sum(row["status"] == "stopped" for row in rows.values()),
        "flops": {"full_grid": alone.spent, "full_grid_closed_form": alone.flops, **cost},
        "searched_share_of_full_grid": cost["spent"] / alone.spent,
        "largest_difference_of_a_shared_trial": max(differ),
        "budgets": [
            budget_row(contest, [t for t in search.fixed if abs(t.flops / contest.flops - 1) < 0.05], alone.losses)
            for contest in load_search([folder / "search"]).contests
        ],
    }


def budget_row(contest: Contest, trials: Iterable[Trial], losses: dict[str, float]) -> dict[str, Any]:
    """The best of one budget, in the full grid and by the search."""
    grown: dict[str, Tried] = {}
    control: dict[int, float] = {}
    formula: dict[int, float] = {}
    for trial in trials:
        values = {key: value for key, value in trial.values.items() if key != "seed"}
        tried = grown.setdefault(json.dumps(values, sort_keys=True), Tried(values, {})) if not trial.control else None
        (tried.losses if tried else control)[trial.run.seed] = losses[trial.name]
        if trial.formula:
            formula[trial.run.seed] = losses[trial.name]
    best, *others = sorted(grown.values(), key=lambda tried: tried.mean)
    assert contest.best
    assert contest.best.loss
    found = next(tried for tried in grown.values() if tried.values == contest.best.values)
    return {
        "flops": contest.flops,
        "settings": len(grown),
        "best": best.values,
        "val_loss": best.mean,
        "by_seed": best.losses,
        "margin_to_the_second": best.ahead_of(others[0]).__dict__,
        "second": others[0].values,
        "worst_val_loss": others[-1].mean,
        "found": contest.best.values,
        "found_seeds": contest.best.loss.seeds,
        "same": found is best,
        "lost": found.mean - best.mean,
        "formula_val_loss": sum(formula.values()) / len(formula),
        "scratch_val_loss": sum(control.values()) / len(control),
    }


def print_comparison(result: dict[str, Any]) -> None:
    """What both named and what both spent."""
    print(f"\n{'FLOPs':<10}{'best of the full grid':<30}{'val loss':>9}{'margin':>16}  {'best of the search':<30}same")
    for row in result["budgets"]:
        margin = interval(Estimate(**row["margin_to_the_second"]))
        best, found = (words(row[which]) for which in ("best", "found"))
        print(f"{row['flops']:<10.3g}{best:<30}{row['val_loss']:>9.4f}{margin:>16}  {found:<30}{row['same']}")
    flops = result["flops"]
    print(
        f"\nfull grid, {result['trials']} trials alone: {flops['full_grid']:.4g} FLOPs counted, "
        f"{flops['full_grid_closed_form']:.4g} by the closed form\n"
        f"with shared work: {flops['shared']:.4g} by the closed form, {flops['shared'] / flops['full_grid']:.1%}\n"
        f"and {result['stopped_early']} trials stopped early: {flops['spent']:.4g} counted, "
        f"{result['searched_share_of_full_grid']:.1%}\n"
        f"largest difference between a trial's loss shared and alone: "
        f"{result['largest_difference_of_a_shared_trial']:.3g}\n"
    )


def words(values: dict[str, Any]) -> str:
    """A setting in short."""
    return ", ".join(f"{key.split('.')[-1]} {value:g}" for key, value in values.items() if key != "plan.tokens")


ARMS = ("searched", "second", "formula", "scratch")


def unseen_seeds(
    search: Search,
    seconds: Sequence[dict[str, Any]],
    folder: Path,
    pool: ProcessPoolExecutor,
    *,
    seeds: Sequence[int],
) -> list[dict[str, Any]]:
    """The searched setting of each budget, the full grid's second, the formula's and scratch, on new seeds."""
    contests = load_search([folder / "search"]).contests
    arms: dict[str, list[Trial]] = {arm: [] for arm in ARMS}
    for contest, second in zip(contests, seconds, strict=True):
        same = [trial for trial in search.fixed if abs(trial.flops / contest.flops - 1) < 0.05]
        assert contest.best
        best = contest.best.trials[0].name
        arms["searched"].append(next(trial for trial in same if trial.name == best))
        arms["second"].append(next(trial for trial in same if second.items() <= trial.values.items()))
        arms["formula"].append(next(trial for trial in same if trial.formula))
        arms["scratch"].append(next(trial for trial in same if trial.control))
    groups = {
        (arm, seed): [reseeded(trial, seed, arm) for trial in trials] for seed in seeds for arm, trials in arms.items()
    }
    losses = train_all(list(groups.values()), folder / "unseen", pool).losses
    rows = []
    for i in range(len(contests)):
        ends = {arm: {seed: losses[groups[arm, seed][i].name] for seed in seeds} for arm in arms}
        searched = Tried({}, ends["searched"])
        ahead = {arm: searched.ahead_of(Tried({}, ends[arm])).__dict__ for arm in ARMS[1:]}
        flops = {arm: trials[i].flops for arm, trials in arms.items()}
        rows.append({"flops": flops, "val_loss": ends, "searched_ahead_of": ahead})
    return rows


def reseeded(trial: Trial, seed: int, arm: str) -> Trial:
    """A trial with another seed, under another name."""
    return replace(trial, name=f"{arm}-{trial.flops:.3g}-seed{seed}", run=replace(trial.run, seed=seed))


def print_unseen(rows: list[dict[str, Any]]) -> None:
    """Means over the unseen seeds, and what the searched setting gains, seed by seed."""
    seeds = ", ".join(map(str, rows[0]["val_loss"]["searched"]))
    print(f"unseen seeds {seeds}: validation loss at equal FLOPs, and how far searched is below")
    print(f"{'FLOPs':<10}" + "".join(f"{arm:>17}" for arm in [*ARMS, *(f"below {arm}" for arm in ARMS[1:])]))
    for row in rows:
        ends = [interval(estimate(row["val_loss"][arm].values())) for arm in ARMS]
        ahead = [interval(Estimate(**row["searched_ahead_of"][arm]), signed=True) for arm in ARMS[1:]]
        print(f"{row['flops']['scratch']:<10.3g}" + "".join(f"{cell:>17}" for cell in [*ends, *ahead]))
    print()


if __name__ == "__main__":
    main()
