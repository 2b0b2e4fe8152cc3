"""Which trials a search runs, and which it stops: the two choices that Ray Tune leaves to others."""

import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from raygrow.runtime.trial import SearchFolder
from raygrow.space import LISTS
from raygrow.trials import SAME_BUDGET, Search, Trial

MOST_ATTEMPTS = 300
"""Suggestions in a row that may all have been made before; then there is nothing left to try."""
DIGITS = 6
"""Of a drawn number: a trial's name gives its values in full."""


class Points(Searcher):
    """Names the fixed trials one by one, then gives what another searcher suggests, but no trial twice.

    Args:
        points_to_evaluate: Names of the fixed trials.
        suggester: Chooses the values of further trials.
        trial_at: The trial at chosen values.
    """

    def __init__(
        self,
        points_to_evaluate: list[str],
        suggester: Searcher | None,
        trial_at: Callable[[Mapping[str, Any]], Trial],
    ) -> None:
        super().__init__(metric="val_loss", mode="min")
        self._points, self._suggester, self._trial_at = points_to_evaluate, suggester, trial_at
        self._given = 0
        self._names = {*points_to_evaluate}
        """Of all trials there are: two of one name would be at work in one folder."""
        self._asked: dict[str, str] = {}
        """What the suggester calls a trial that it has suggested."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial, as `Search.trial_of` takes it."""
        if self._given < len(self._points):
            self._given += 1
            return {"name": self._points[self._given - 1]}
        return self._suggest_another(trial_id, self._suggester) if self._suggester else Searcher.FINISHED

    def _suggest_another(self, trial_id: str, suggester: Searcher) -> dict[str, Any] | str | None:
        for attempt in range(MOST_ATTEMPTS):
            asked = f"{trial_id}-{attempt}"
            suggested = suggester.suggest(asked)
            if not isinstance(suggested, dict):
                return suggested
            values = {key: _rounded(value) for key, value in suggested.items()}
            name = self._trial_at(values).name
            if name not in self._names:
                self._names.add(name)
                self._asked[trial_id] = asked
                return {"values": values}
            suggester.on_trial_complete(asked)  # that nothing came of it has Optuna look elsewhere
        return Searcher.FINISHED

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Passes on what a suggested trial has reached."""
        if self._suggester and trial_id in self._asked:
            self._suggester.on_trial_result(self._asked[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Passes on how a suggested trial has ended."""
        if self._suggester and trial_id in self._asked:
            self._suggester.on_trial_complete(self._asked[trial_id], result, error)

    def save(self, checkpoint_path: str) -> None:
        """Writes all that a restored search needs."""
        Path(checkpoint_path).write_bytes(pickle.dumps(self.__dict__))

    def restore(self, checkpoint_path: str) -> None:
        """Reads what `save` has written."""
        self.__dict__.update(pickle.loads(Path(checkpoint_path).read_bytes()))


def chooser(search: Search) -> Points:
    """Gives the fixed trials, and then, with `search: optuna`, what Optuna makes of those before.

    The largest budgets come first: they train what others fork from, so fewer trials hold a place while they wait for
    it, and none is left to run alone at the end.
    """
    names = [trial.name for trial in sorted(search.fixed, key=lambda trial: -float(f"{trial.flops:.1e}"))]
    if not search.samples:
        return Points(names, None, search.trial)
    space: Any = {key: _distribution(values) for key, values in search.space.space.items()}
    return Points(names, OptunaSearch(space, metric="val_loss", mode="min", seed=search.run.seed), search.trial)


def _distribution(values: Mapping[str, list[Any]]) -> BaseDistribution:
    kind, numbers = next(iter(values.items()))
    if kind in LISTS:
        return CategoricalDistribution(numbers)
    low, high, *step = numbers
    if kind != "quniform":
        return FloatDistribution(low, high, log=kind == "loguniform")
    if all(isinstance(number, int) for number in numbers):
        return IntDistribution(low, high, step=step[0])
    return FloatDistribution(low, high, step=step[0])


def _rounded(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


@dataclass(frozen=True)
class Heat:
    """Where trials of one budget are held against each other."""

    budget: float
    first_rung: float
    """FLOPs at which they are compared for the first time: a while after the last growth of any of them."""
    last_rung: float
    """And after which they are not any more."""


def heats(trials: Iterable[Trial], *, grace: float) -> tuple[Heat, ...]:
    """One heat for each budget that trials have.

    Where trials decay by different schedules, they are compared until the first one starts: a decayed loss is lower for
    that alone.

    Args:
        trials: What is tried, or at least the extremes of it.
        grace: See `AshaConfig`.
    """
    groups: list[list[Trial]] = []
    for trial in sorted(trials, key=lambda trial: trial.flops):
        if not groups or trial.flops > (1 + SAME_BUDGET) * groups[-1][0].flops:
            groups.append([])
        groups[-1].append(trial)
    found = []
    for group in groups:
        budget = group[-1].flops
        grown = [trial for trial in group if not trial.control]
        first = min(max(trial.grown_at for trial in group) + grace * budget, budget)
        schedules = {_schedule(trial) for trial in grown}
        last = min(trial.decays_at for trial in grown) if len(schedules) > 1 else budget
        found.append(Heat(budget, first, last))
    return tuple(found)


def _schedule(trial: Trial) -> tuple[Any, ...]:
    """How a trial was told to decay."""
    run, schedule = trial.run, trial.run.train.schedule
    return schedule.kind, schedule.decay, run.plan.phases[trial.phases[-1].name].decay


class AshaOnFlops(FIFOScheduler):
    """Asynchronous successive halving on the FLOPs spent, from a while after the last growth on.

    A trial is held against those of the same budget and seed alone: at the same FLOPs, a longer budget has yet to decay
    its learning rate, and another seed sees other data. At a rung counts the loss there, interpolated between the
    evaluations around it, since phases evaluate at their own steps. Controls are exempt, and what has come to its end
    is not stopped.

    Args:
        trial_of: The trial that Tune was told to run.
        scores: Gives the evaluations of a trial, for when a search goes on: who has ended already still counts.
        heats: Where trials are compared.
        reduction_factor: See `AshaConfig`.
    """

    def __init__(
        self,
        trial_of: Callable[[dict[str, Any]], Trial],
        scores: Callable[[Trial], Iterable[dict[str, Any]]],
        heats: tuple[Heat, ...],
        *,
        reduction_factor: float,
    ) -> None:
        super().__init__()
        self._trial_of, self._scores, self._heats = trial_of, scores, heats
        self._reduction_factor = reduction_factor
        self._brackets: dict[tuple[Heat, int], Bracket] = {}
        self._running: dict[str, tuple[Bracket, dict[str, Any] | None]] = {}
        """Bracket and last evaluation of every trial that may be stopped."""

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Takes a trial in."""
        ours = self._trial_of(trial.config)
        heat = next((heat for heat in self._heats if abs(ours.flops / heat.budget - 1) <= SAME_BUDGET), None)
        if heat is None or ours.control:
            return
        bracket = self._brackets.setdefault((heat, ours.run.seed), Bracket(heat, self._reduction_factor))
        self._running[trial.trial_id] = bracket, None
        if trial.is_finished():
            for score in self._scores(ours):
                self.on_trial_result(tune_controller, trial, score)
            del self._running[trial.trial_id]

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """Whether a trial goes on."""
        if result["ends"] or trial.trial_id not in self._running:
            return TrialScheduler.CONTINUE
        bracket, before = self._running[trial.trial_id]
        self._running[trial.trial_id] = bracket, result
        goes_on = bracket.goes_on(trial.trial_id, before, result)
        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Forgets a trial that has failed."""
        self._running.pop(trial.trial_id, None)

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        """Forgets a trial that has ended."""
        self._running.pop(trial.trial_id, None)

    def on_trial_remove(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Forgets a trial that has gone."""
        self._running.pop(trial.trial_id, None)


class Bracket:
    """The rungs of one heat, and who came to each with what loss.

    Args:
        heat: Which.
        reduction_factor: See `AshaConfig`.
    """

    def __init__(self, heat: Heat, reduction_factor: float) -> None:
        self._reduction_factor = reduction_factor
        self._losses: dict[float, dict[str, float]] = {}
        rung = heat.first_rung
        while rung < heat.last_rung:
            self._losses[rung] = {}
            rung *= reduction_factor

    def goes_on(self, who: str, before: Mapping[str, Any] | None, result: Mapping[str, Any]) -> bool:
        """Whether a trial is among the best at every rung that it has come to since its evaluation before."""
        passed = [rung for rung, losses in self._losses.items() if rung <= result["flops"] and who not in losses]
        return all(self._is_among_best(who, rung, _loss_at(rung, before, result)) for rung in passed)

    def _is_among_best(self, who: str, rung: float, loss: float) -> bool:
        others = self._losses[rung]
        others[who] = loss
        return sum(other < loss for other in others.values()) <= (len(others) - 1) / self._reduction_factor


def _loss_at(flops: float, before: Mapping[str, Any] | None, result: Mapping[str, Any]) -> float:
    """Validation loss between two evaluations; that of the later one where a growth lies between them."""
    if not before or before["phase"] != result["phase"] or not before["flops"] < flops:
        return result["val_loss"]
    share = (flops - before["flops"]) / (result["flops"] - before["flops"])
    return before["val_loss"] + share * (result["val_loss"] - before["val_loss"])


def stopper(search: Search, folder: SearchFolder) -> TrialScheduler:
    """What stops trials early, as the space says."""
    asha = search.space.asha
    if asha is None:
        return FIFOScheduler()
    return AshaOnFlops(
        search.trial_of,
        partial(_scores, folder),
        heats(search.corners, grace=asha.grace),
        reduction_factor=asha.reduction_factor,
    )


def _scores(folder: SearchFolder, trial: Trial) -> list[dict[str, Any]]:
    """The evaluations that a trial's folder tells of."""
    lines = folder.run(trial.name).read_history()
    return [line | {"ends": False} for line in lines if "val_loss" in line]
