"""Which trials a search runs, and which it stops: the two choices that Ray Tune leaves to others."""

import pickle
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from raygrow.runtime.trial import SearchFolder
from raygrow.space import LISTS
from raygrow.trials import Search

DIGITS = 6
"""Of a drawn number: a trial's name gives its values in full."""


class Points(Searcher):
    """Names the fixed trials one by one, then gives what another searcher suggests.

    Args:
        points_to_evaluate: Names of the fixed trials.
        suggester: Chooses the values of further trials.
    """

    def __init__(self, points_to_evaluate: list[str], suggester: Searcher | None) -> None:
        super().__init__(metric="val_loss", mode="min")
        self._points, self._suggester = points_to_evaluate, suggester
        self._given = 0
        self._suggested: set[str] = set()

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial, as `Search.trial_of` takes it."""
        if self._given < len(self._points):
            self._given += 1
            return {"name": self._points[self._given - 1]}
        if not self._suggester:
            return Searcher.FINISHED
        values = self._suggester.suggest(trial_id)
        if not isinstance(values, dict):
            return values
        self._suggested.add(trial_id)
        return {"values": {key: _rounded(value) for key, value in values.items()}}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Passes on what a suggested trial has reached."""
        if self._suggester and trial_id in self._suggested:
            self._suggester.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Passes on how a suggested trial has ended."""
        if self._suggester and trial_id in self._suggested:
            self._suggester.on_trial_complete(trial_id, result, error)

    def save(self, checkpoint_path: str) -> None:
        """Writes all that a restored search needs."""
        Path(checkpoint_path).write_bytes(pickle.dumps(self.__dict__))

    def restore(self, checkpoint_path: str) -> None:
        """Reads what `save` has written."""
        self.__dict__.update(pickle.loads(Path(checkpoint_path).read_bytes()))


def chooser(search: Search) -> Points:
    """Gives the fixed trials, and then, with `search: optuna`, what Optuna makes of those before."""
    names = [trial.name for trial in search.fixed]
    if not search.samples:
        return Points(names, None)
    space: Any = {key: _distribution(values) for key, values in search.space.space.items()}
    return Points(names, OptunaSearch(space, metric="val_loss", mode="min", seed=search.run.seed))


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


class AshaOnFlops(AsyncHyperBandScheduler):
    """Asynchronous successive halving on the FLOPs spent, from a while after the last growth on.

    Controls are exempt, and what has come to its end is not stopped.

    Args:
        scores: Gives the evaluations of a trial, for when a search goes on: who has ended already still counts.
        controls: Names of the trials that run to their end whatever happens.
        first_rung: FLOPs at which trials are compared for the first time.
        budget: FLOPs of the longest trial.
        reduction_factor: See `AshaConfig`.
    """

    def __init__(
        self,
        scores: Callable[[dict[str, Any]], Iterable[dict[str, Any]]],
        controls: set[str],
        *,
        first_rung: float,
        budget: float,
        reduction_factor: float,
    ) -> None:
        super().__init__(
            time_attr="flops",
            metric="val_loss",
            mode="min",
            grace_period=first_rung,  # pyright: ignore[reportArgumentType]
            max_t=budget,  # pyright: ignore[reportArgumentType]
            reduction_factor=reduction_factor,
            stop_last_trials=False,
        )
        self._scores, self._controls = scores, controls

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Takes a trial in."""
        super().on_trial_add(tune_controller, trial)
        if trial.is_finished():
            for score in self._scores(trial.config):
                self.on_trial_result(tune_controller, trial, score)
            self._trial_info.pop(trial.trial_id)

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """Whether a trial goes on."""
        if result["ends"] or trial.config.get("name") in self._controls:
            return TrialScheduler.CONTINUE
        return super().on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        """Forgets a trial that has ended."""
        self._trial_info.pop(trial.trial_id, None)


def stopper(search: Search, folder: SearchFolder) -> TrialScheduler:
    """What stops trials early, as the space says."""
    asha = search.space.asha
    if asha is None:
        return FIFOScheduler()
    grown_at = max(trial.grown_at for trial in search.corners)
    return AshaOnFlops(
        partial(_scores, search, folder),
        {trial.name for trial in search.fixed if trial.control},
        first_rung=min(grown_at + asha.grace * search.flops, search.flops),
        budget=search.flops,
        reduction_factor=asha.reduction_factor,
    )


def _scores(search: Search, folder: SearchFolder, point: dict[str, Any]) -> list[dict[str, Any]]:
    """The evaluations that a trial's folder tells of."""
    lines = folder.run(search.trial_of(point).name).read_history()
    return [line | {"ends": False} for line in lines if "val_loss" in line]
