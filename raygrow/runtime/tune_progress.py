"""What a search says while it runs: a line for every trial that ends, and how far it is in between."""

import math
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial as TuneTrial
from rich.console import Console

from raygrow.report.units import duration
from raygrow.train.shared import Segment, segments
from raygrow.trials import Search, Trial

LOG_SECONDS = 30.0
"""Longest time without a line."""
NAMED = 4
"""Trials at work that a line names."""


class Told(Callback):
    """Prints how trials go. Tune keeps it in a pickle, from which a search that goes on has it.

    Args:
        search: The search.
        data: Prepared data folder.
    """

    def __init__(self, search: Search, data: Path) -> None:
        self._search, self._data = search, data
        self._total = len(search.fixed) + search.samples
        self._segments = {trial.name: self._cut(trial) for trial in search.fixed}

    def setup(self, *args: Any, **info: Any) -> None:
        """Begins anew, also where a search goes on."""
        self._last_line = time.monotonic()
        self._first: tuple[float, float] | None = None
        """When the first result came, and the FLOPs that were done then."""

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        """Says how far the search is, when nothing has been said for long."""
        if time.monotonic() - self._last_line > LOG_SECONDS:
            at_work = [trial for trial in trials if trial.status == TuneTrial.RUNNING]
            words = [self._how_far(trial) for trial in at_work[:NAMED]]
            more = [f"{len(at_work) - NAMED} more"] if len(at_work) > NAMED else []
            self._tell(trials, ", ".join(words + more) or "no trial has a process yet")

    def on_trial_result(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        """A trial has been evaluated."""
        if self._first is None:
            self._first = time.monotonic(), self._work(trials, [])[0]

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """A trial has ended, early or not."""
        result = trial.last_result
        how = "finished" if result.get("ends") else "stopped early"
        how = f"{how}, val {result.get('val_loss', math.nan):.4f}"
        self._tell(trials, f"{self._trial(trial).name}: {result.get('failure') or how}", ending=trial)

    def on_trial_recover(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """A trial has lost its process and is given another."""
        self._tell(trials, f"{self._trial(trial).name}: has lost its process, and goes on from its last state")

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """A trial has lost its process for the last time."""
        self._tell(trials, f"{self._trial(trial).name}: has lost its process too often, and is given up", ending=trial)

    def _tell(self, trials: list[TuneTrial], what: str, *, ending: TuneTrial | None = None) -> None:
        ended = [trial for trial in trials if trial.is_finished() or trial is ending]
        done, left = self._work(trials, ended)
        share = done / (done + left) if done else 0.0
        line = f"[{len(ended)}/{self._total} ended, {share:.0%} of the FLOPs] {what}"
        began, done_before = self._first or (0.0, done)
        if left and done > done_before:
            line += f" (about {duration(left / (done - done_before) * (time.monotonic() - began))} left)"
        Console().print(line, highlight=False, markup=False, soft_wrap=True)
        self._last_line = time.monotonic()

    def _how_far(self, trial: TuneTrial) -> str:
        """A trial at work, with its newest loss where it has one."""
        found, result = self._trial(trial), trial.last_result
        at = f" at {result['flops'] / found.flops:.0%}, val {result['val_loss']:.4f}" if "val_loss" in result else ""
        return found.name + at

    def _work(self, trials: list[TuneTrial], ended: list[TuneTrial]) -> tuple[float, float]:
        """FLOPs of the search, done and left; a trial that is not chosen yet counts as the longest there may be."""
        reached = dict.fromkeys(self._segments, 0.0)
        reached |= {self._trial(trial).name: trial.last_result.get("flops", 0.0) for trial in trials}
        done, left = work(self._segments, reached, {self._trial(trial).name for trial in ended})
        return done, left + (self._total - len(reached)) * self._search.flops

    def _trial(self, trial: TuneTrial) -> Trial:
        found = self._search.trial_of(trial.config)
        if found.name not in self._segments:
            self._segments[found.name] = self._cut(found)
        return found

    def _cut(self, trial: Trial) -> tuple[Segment, ...]:
        return segments(trial.phases, trial.run.train, data=self._data, seed=trial.run.seed)


def work(
    trials: Mapping[str, Sequence[Segment]], reached: Mapping[str, float], ended: Collection[str]
) -> tuple[float, float]:
    """FLOPs that trials have done and those that they have left, what is shared counted once.

    Args:
        trials: The segments of each trial.
        reached: How far each trial's history goes, in FLOPs, whoever spent them.
        ended: Trials that go no further.
    """
    done: dict[str, float] = defaultdict(float)
    wanted: dict[str, float] = defaultdict(float)
    for name, cut in trials.items():
        before = 0.0
        for segment in cut:
            done[segment.key] = max(done[segment.key], min(max(reached[name] - before, 0.0), segment.flops))
            if name not in ended:
                wanted[segment.key] = max(wanted[segment.key], segment.flops)
            before += segment.flops
    left = sum(max(flops - done[key], 0.0) for key, flops in wanted.items())
    return sum(done.values()), left
