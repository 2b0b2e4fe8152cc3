"""Reads the folder of a search and finds its answer: the best setting against the formula's timing and from scratch.

Trials that differ in their seed alone are one *setting*. Settings of one target and one budget are a *contest*: only
their losses can be held against each other. A search has one contest, or one for each budget that it tries.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from raygrow.growth.timing_fit import TimingFit, TimingPoint, fit_timing
from raygrow.nn.config import ModelConfig
from raygrow.nn.cost import block_parameters, training_flops_per_token
from raygrow.report.estimate import Estimate, estimate
from raygrow.report.runs import Run, load_run, read_yaml
from raygrow.weights.json_file import read_json

RESULTS_FILE = "results.json"
COST_FILE = "cost.json"
SEARCH_FILE = "search.yaml"
SAME_BUDGET = 0.05
"""Budgets this close are one: phases end on whole steps, and a control spends what the grown run's phases add up to."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial: its line of results.json, and its run folder where that is there."""

    name: str
    values: dict[str, Any]
    """What the search chose, by dotted key."""
    status: str
    """`finished`, `stopped` (early, as hopeless), `failed`, or `in progress`; before a search has its results, that may
    also be `stopped`."""
    val_loss: float | None
    flops: float
    is_control: bool
    is_formula: bool
    run: Run | None

    @property
    def seed(self) -> Any:
        settings = self.run.settings if self.run else {}
        return self.values.get("seed", settings.get("seed", 0))

    @property
    def setting(self) -> dict[str, Any]:
        """The values without the seed."""
        return {key: value for key, value in self.values.items() if key != "seed"}


@dataclass(frozen=True)
class Setting:
    """The trials that differ in their seed alone, at most one of each seed."""

    trials: tuple[Trial, ...]

    @property
    def values(self) -> dict[str, Any]:
        return self.trials[0].setting

    @property
    def is_control(self) -> bool:
        return self.trials[0].is_control

    @property
    def is_formula(self) -> bool:
        return any(trial.is_formula for trial in self.trials)

    @property
    def finished(self) -> dict[Any, Trial]:
        """The trials that came to their end with a loss, by seed."""
        return {t.seed: t for t in self.trials if t.status == "finished" and t.val_loss is not None}

    @property
    def loss(self) -> Estimate | None:
        """Validation loss at the end of the budget; None while no trial has come there."""
        return estimate(trial.val_loss for trial in self.finished.values() if trial.val_loss is not None)

    @property
    def flops(self) -> float:
        """FLOPs that its trials spent, on average."""
        return float(np.mean([trial.flops for trial in self.trials]))

    @cached_property
    def base(self) -> tuple[float, float] | None:
        """FLOPs and tokens before the first growth; None from scratch, or where no trial came that far."""
        return next((base for trial in self.trials if trial.run and (base := _base(trial.run))), None)


@dataclass(frozen=True)
class Contest:
    """The settings that share a target and a budget."""

    model: ModelConfig
    flops: float
    """The budget."""
    seq_len: int
    settings: tuple[Setting, ...]

    @property
    def grown(self) -> list[Setting]:
        """Settings that grow and have a loss, best first; those that more seeds have tried come before others."""
        found = [(s.loss, s) for s in self.settings if not s.is_control]
        ranked = sorted(
            ((loss, s) for loss, s in found if loss is not None), key=lambda pair: (-pair[0].seeds, pair[0].mean)
        )
        return [setting for _, setting in ranked]

    @property
    def best(self) -> Setting | None:
        """The lowest mean loss among the settings that most seeds have tried."""
        return self.grown[0] if self.grown else None

    @property
    def control(self) -> Setting | None:
        """The final model from scratch; the best of them where the search tuned it too."""
        return _lowest([setting for setting in self.settings if setting.is_control])

    @property
    def formula(self) -> Setting | None:
        """The published formula's timing; the best of them where the search tuned what is not of the phases too."""
        found = [setting for setting in self.settings if setting.is_formula]
        return _lowest(found) or next(iter(found), None)

    def share(self, setting: Setting) -> float | None:
        """Share of the budget that was spent before the first growth."""
        return setting.base[0] / self.flops if setting.base else None

    def at_edge(self, setting: Setting) -> bool:
        """Whether no earlier or no later growth was tried, so that the best timing may lie outside of what was."""
        own = self.share(setting)
        if own is None:
            return False
        # relative to it; steps are whole, so that equal shares of different bases are not quite equal
        others = [share / own for s in self.grown if (share := self.share(s)) is not None]
        earlier, later = min(others) < 1 - SAME_BUDGET, max(others) > 1 + SAME_BUDGET
        return earlier != later


@dataclass(frozen=True)
class Cost:
    """What a search costs, in FLOPs."""

    spent: float
    """Trained in fact, what was done twice counted twice; less than `shared` where trials were stopped early."""
    shared: float
    """All trials to their ends, with what they have in common trained once."""
    alone: float
    """All trials to their ends, each by itself."""


@dataclass(frozen=True)
class Search:
    """One search, or several that are looked at together."""

    folders: tuple[Path, ...]
    trials: tuple[Trial, ...]
    contests: tuple[Contest, ...]
    """Ascending by budget."""
    cost: Cost | None = None
    """Of all together; None while one is not over."""

    @property
    def name(self) -> str:
        return ", ".join(folder.name for folder in self.folders)

    @property
    def contest(self) -> Contest | None:
        """The one that the answer is about: the largest budget in which a grown trial has finished."""
        return next((contest for contest in reversed(self.contests) if contest.best), None)

    @property
    def best_trial(self) -> Trial | None:
        """One trial of the best setting."""
        best = self.contest.best if self.contest else None
        return next(iter(best.finished.values())) if best else None

    @property
    def formula_trial(self) -> Trial | None:
        """One trial of the formula's timing, finished or not, in the same contest."""
        formula = self.contest.formula if self.contest else None
        return next((trial for trial in formula.trials if trial.run and trial.run.settings), None) if formula else None

    def fit(self) -> TimingFit | None:
        """The formula's constants from the best timing of every contest; None where no setting has finished."""
        points = [point for contest in self.contests if (point := timing_point(contest)) is not None]
        return fit_timing(points) if points else None


def is_search(path: Path) -> bool:
    """Whether a folder is that of a search."""
    return any((Path(path) / name).is_file() for name in (RESULTS_FILE, SEARCH_FILE))


def are_searches(folders: Sequence[Path]) -> bool:
    """Whether all of these are folders of searches; False if none is.

    Raises:
        ValueError: If some are, others are not.
    """
    found = {folder: is_search(folder) for folder in folders}
    if len(set(found.values())) > 1:
        search, other = (next(folder for folder, what in found.items() if what is kind) for kind in (True, False))
        raise ValueError(f"{search} is a search and {other} is none: report one kind at a time")
    return all(found.values())


def load_search(folders: Sequence[Path]) -> Search:
    """Reads folders of searches.

    Raises:
        FileNotFoundError: If the folder of a finished trial is not there.
        ValueError: If a file is damaged; names it.
    """
    folders = tuple(Path(folder).resolve() for folder in folders)
    trials = tuple(trial for folder in folders for trial in _read_trials(folder))
    return Search(folders, trials, _contests(trials), _cost(folders))


def timing_point(contest: Contest) -> TimingPoint | None:
    """The best timing of a contest, in the units of the formula."""
    best = contest.best
    if best is None or best.base is None:
        return None
    params = sum(block_parameters(contest.model, block) for block in range(contest.model.n_blocks))
    tokens = contest.flops / training_flops_per_token(contest.model, contest.seq_len)
    return TimingPoint(params=params, flops=6 * params * tokens, base_tokens=best.base[1])


def _lowest(settings: Sequence[Setting]) -> Setting | None:
    """The setting with the lowest mean loss; None where none has a loss."""
    found = [(loss.mean, setting) for setting in settings if (loss := setting.loss)]
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _cost(folders: Sequence[Path]) -> Cost | None:
    files = [folder / COST_FILE for folder in folders]
    if not all(file.is_file() for file in files):
        return None
    costs = [read_json(file) for file in files]
    return Cost(**{field.name: sum(cost[field.name] for cost in costs) for field in fields(Cost)})


def _read_trials(folder: Path) -> list[Trial]:
    file = folder / RESULTS_FILE
    if not file.is_file():
        return _trials_so_far(folder)
    try:
        return [_trial(row, folder) for row in json.loads(file.read_text())]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}): start the search again under its name to write it") from error


def _trials_so_far(folder: Path) -> list[Trial]:
    """The trials that have begun in a search without results yet, from their run folders alone."""
    space = (read_yaml(folder / SEARCH_FILE).get("space") or {}).get("space") or {}
    runs = [load_run(file.parent) for file in sorted((folder / "trials").glob("*/run.yaml"))]
    trials = []
    for run in runs:
        values = {key: value for key in space if (value := _at(run.settings, key)) is not None}
        trial = Trial(
            name=run.name,
            values=values,
            # while it runs a trial says that it was stopped, since it may be at any moment
            status="in progress" if run.status == "stopped" else run.status,
            val_loss=run.last("val_loss"),
            flops=run.last("flops") or 0.0,
            is_control=not run.is_grown,
            is_formula=run.name.startswith("formula"),
            run=run,
        )
        trials.append(trial)
    return trials


def _at(tree: Any, key: str) -> Any:
    """The value at a dotted key; None where there is none."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _trial(row: dict[str, Any], folder: Path) -> Trial:
    path = folder / row["folder"]
    if not path.is_dir():  # the search may have been moved since
        path = folder / "trials" / row["name"]
    run = load_run(path) if row["status"] == "finished" or (path / "run.yaml").is_file() else None
    return Trial(
        name=row["name"],
        values=row["values"],
        status=row["status"],
        val_loss=row["val_loss"],
        flops=row["flops"] or 0.0,
        is_control=row["control"] or (run is not None and not run.is_grown),
        is_formula=row["formula"],
        run=run,
    )


def _contests(trials: Sequence[Trial]) -> tuple[Contest, ...]:
    groups: list[tuple[ModelConfig, float, int, list[Trial]]] = []
    for trial in trials:
        if trial.run is None or not trial.run.settings:
            continue
        settings = trial.run.settings
        try:
            model, seq_len, plan = ModelConfig(**settings["model"]), settings["train"]["seq_len"], settings["plan"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{trial.run.path / 'run.yaml'}: cannot be read ({type(error).__name__}: {error}); was it written by "
                "another version of raygrow?"
            ) from error
        tokens, flops = plan.get("tokens"), plan.get("flops")
        budget = flops or (tokens or 0) * training_flops_per_token(model, seq_len) or trial.flops
        if not budget:  # nobody says how long it is to train, and it has not begun to
            continue
        for other_model, other_budget, _, group in groups:
            if other_model.regrouped(1) == model.regrouped(1) and abs(budget / other_budget - 1) <= SAME_BUDGET:
                group.append(trial)
                break
        else:
            groups.append((model, budget, seq_len, [trial]))
    contests = (Contest(model, budget, seq_len, _settings(group)) for model, budget, seq_len, group in groups)
    return tuple(sorted(contests, key=lambda contest: contest.flops))


def _settings(trials: Sequence[Trial]) -> tuple[Setting, ...]:
    groups: dict[str, dict[Any, Trial]] = {}
    for trial in trials:
        key = json.dumps([trial.is_control, sorted(trial.setting.items())], default=str)
        same = groups.setdefault(key, {})
        # the formula's timing may also be one of the grid's: the same trial twice
        if trial.seed not in same or trial.is_formula:
            same[trial.seed] = trial
    return tuple(Setting(tuple(group.values())) for group in groups.values())


def _base(run: Run) -> tuple[float, float] | None:
    """FLOPs and tokens of a run before its first growth."""
    phases = run.settings["plan"]["phases"]
    grows = [name for name, phase in phases.items() if phase and phase.get("growth")]
    index = next((i for i, line in enumerate(run.history) if grows and line["phase"] == grows[0]), 0)
    return (run.history[index - 1]["flops"], run.history[index - 1]["tokens"]) if index else None
