"""One trial of a search, in the process that Ray Tune has given it."""

import math
import os
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.actor import ActorHandle

from raygrow.runtime.run_folder import RunFolder
from raygrow.runtime.trunks import Process, claimed
from raygrow.train.loop import Outcome
from raygrow.train.session import Record
from raygrow.train.shared import Segment, growths_of, history_of, segments, train_segment
from raygrow.trials import Search, Trial

EARLY = Outcome("stopped", "stopped early")
REPORTED = ("phase", "step", "tokens", "flops", "val_loss")


@dataclass(frozen=True)
class SearchFolder:
    """Where a search keeps what it has."""

    path: Path

    @property
    def settings(self) -> Path:
        """The search itself: its run and its space."""
        return self.path / "search.yaml"

    @property
    def states(self) -> Path:
        """States that trials share."""
        return self.path / "states"

    def run(self, trial: str) -> RunFolder:
        """The folder of a trial, a run's like any other."""
        return RunFolder(str(self.path / "trials" / trial))


def train_trial(
    point: dict[str, Any], *, search: Search, folder: SearchFolder, data: Path, trunks: ActorHandle
) -> None:
    """Trains a trial from wherever its segments stand, and reports every evaluation to Tune.

    Args:
        point: Which one, as `Search.trial_of` takes it.
        search: The search.
        folder: Its folder.
        data: Prepared data folder.
        trunks: The actor that hands out segments.
    """
    # a process is given the next trial when the thread of the one before has ended; Tune's 2 seconds can be too few
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "60")
    trial = search.trial_of(point)
    resources = tune.get_context().get_trial_resources().required_resources
    torch.set_num_threads(max(1, int(resources.get("CPU", 1))))
    running = _Trial(trial, folder, data, trunks, device="cuda:0" if resources.get("GPU") else "cpu")
    running.train()


class _Trial:
    """A trial in training."""

    def __init__(self, trial: Trial, folder: SearchFolder, data: Path, trunks: ActorHandle, *, device: str) -> None:
        self.trial, self.folder, self.data, self.trunks, self.device = trial, folder, data, trunks, device
        self.run_folder = folder.run(trial.name)
        self.segments = segments(trial.phases, trial.run.train, data=data, seed=trial.run.seed)
        self.lines: list[Record] = []
        self.who = Process(trial.name, uuid.uuid4().hex)

    def train(self) -> None:
        """Trains what is left; whatever ends it, the trial's folder says how far it came."""
        try:
            self.run_folder.claim(self.trial.run)
        except ValueError as error:  # the folder is another run's, which stays as it is
            self._tell_failure(str(error))
            return
        outcome = EARLY
        try:
            outcome = self._train_segments()
        except ValueError as error:  # would only be met again
            outcome = Outcome("failed", str(error))
        finally:
            self._write(outcome)
        if outcome.status == "failed":
            self._tell_failure(outcome.reason)
        if outcome.status == "stopped":
            threading.Event().wait()  # a function that returns has come to its end for Tune; so this one can go on

    def _train_segments(self) -> Outcome:
        for count, segment in enumerate(self.segments, 1):
            with claimed(segment, self.trunks, self.folder.states, who=self.who) as claim:
                self._catch_up(self.segments[:count])
                if not claim:
                    continue
                outcome = train_segment(
                    segment,
                    self.trial.run.train,
                    states=self.folder.states,
                    data=self.data,
                    seed=self.trial.run.seed,
                    device=self.device,
                    save_at=claim.forks,
                    on_record=self._on_record,
                    stop_requested=claim.stop.is_set,
                )
                if outcome.status == "stopped":
                    self._write(outcome)  # the driver waits until the claim is given back
            if outcome.status != "finished":
                return outcome
        return Outcome("finished")

    def _catch_up(self, done: Sequence[Segment]) -> None:
        """Takes over the lines of what is trained already, and reports those that are new."""
        known = self.lines[-1]["flops"] if self.lines else -1.0
        self.lines = history_of(done, self.folder.states)
        for line in self.lines:
            if line["flops"] > known:
                self._report(line)

    def _on_record(self, line: Record) -> None:
        self.lines.append(line)
        self._report(line)

    def _report(self, line: Record) -> None:
        """Tells Tune of an evaluation. This is where Tune stops a trial: it ends the thread."""
        last = self.trial.phases[-1]
        ends = line["phase"] == last.name and line["step"] == last.steps
        if "val_loss" in line:
            # before, since the process of a stopped trial may be ended at once
            self._write(EARLY)
            tune.report({key: line[key] for key in REPORTED} | {"ends": ends})

    def _tell_failure(self, reason: str) -> None:
        flops = self.lines[-1]["flops"] if self.lines else 0.0
        tune.report({"val_loss": math.inf, "flops": flops, "ends": True, "failure": f"failed: {reason}"})

    def _write(self, outcome: Outcome) -> None:
        folder = self.run_folder
        folder.write_history([dict(line) for line in self.lines])
        for phase, record in growths_of(self.segments, self.folder.states).items():
            folder.write(f"growth/{phase}.json", record.read_text())
        folder.write_summary(self.trial.phases, outcome)
