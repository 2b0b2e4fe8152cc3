"""States of training kept for forks, and the session that makes them.

`<folder>/step-<step>/` holds the checkpoint of a step and its `history.jsonl`, the lines of its segment up to there, so
that it depends on no other file. It is written aside and renamed: what bears the name is whole, whenever a process
dies. A state that trials fork from is kept for good; others, saved on the way for the case that the process is lost, go
when the next one is there.
"""

import json
import logging
import math
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from raygrow.train.session import Record, checkpoint_name
from raygrow.weights.atomic import replace_file

logger = logging.getLogger(__name__)

HISTORY = "history.jsonl"
GROWTH = "growth.json"
KEEP = "KEEP"
"""Marker file of a state that trials fork from."""
SPENT = "spent.txt"
"""FLOPs trained between two reports, a line each, whatever became of their states: work done twice counts twice."""


class States:
    """The states of one segment's key.

    Args:
        folder: Where they are. Need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, step: int) -> Path:
        """Where the state of a step is, or would be."""
        return self.folder / checkpoint_name(step)

    def steps(self) -> list[int]:
        """Steps whose states are there, in order."""
        return sorted(int(state.name.removeprefix("step-")) for state in self.folder.glob("step-*"))

    def newest(self, step: int) -> int | None:
        """The newest step at or before `step` whose state is there."""
        return max((found for found in self.steps() if found <= step), default=None)

    def is_kept(self, step: int) -> bool:
        """Whether the state of a step is there for good."""
        return (self.of(step) / KEEP).exists()

    def keep(self, steps: Iterable[int]) -> None:
        """Keeps those of the steps' states that are there."""
        for step in steps:
            if self.of(step).is_dir():
                (self.of(step) / KEEP).touch()

    def history(self, step: int) -> list[dict[str, Any]]:
        """The segment's lines up to a step whose state is there."""
        return [json.loads(line) for line in (self.of(step) / HISTORY).read_text().splitlines()]

    def count(self, flops: float) -> None:
        """Notes down FLOPs that have been trained."""
        with (self.folder / SPENT).open("a") as file:
            file.write(f"{flops!r}\n")

    @property
    def spent(self) -> float:
        """FLOPs that were trained for this key."""
        file = self.folder / SPENT
        return math.fsum(map(float, file.read_text().split())) if file.exists() else 0.0

    def aside(self, step: int) -> Path:
        """Where to write the state of a step."""
        return self.folder / f".{checkpoint_name(step)}.{uuid.uuid4().hex[:8]}"

    def add(self, aside: Path, step: int) -> None:
        """Gives a state its name, and removes those before it that are not kept.

        Another process may be at work on the same key, where this one was believed to be lost: who comes second has
        made the same state. What is aside is left to it.
        """
        try:
            os.rename(aside, self.of(step))
        except OSError:
            if not self.of(step).is_dir():
                raise
            if (aside / KEEP).exists():
                self.keep([step])
            shutil.rmtree(aside)
        for earlier in self.steps():
            if earlier < step and not self.is_kept(earlier):
                self._remove(earlier)

    def remove_unkept(self) -> None:
        """Removes states that are not kept, and what dead processes left of others."""
        for step in self.steps():
            if not self.is_kept(step):
                self._remove(step)
        for left in self.folder.glob(".step-*"):
            shutil.rmtree(left, ignore_errors=True)  # one that was just stopped may still be writing

    def _remove(self, step: int) -> None:
        aside = self.aside(step)  # what bears the name stays whole, should this process die
        with suppress(FileNotFoundError):  # another process was first
            os.rename(self.of(step), aside)
            shutil.rmtree(aside)


class StatesSession:
    """A session of one worker that goes on from the nearest state and keeps those that trials fork from.

    Args:
        states: Of the segment in training.
        start: The state of the same phase that the segment begins with, where it does not begin the phase.
        first_step: The step of that state, else 0.
        stop: The step to train to.
        step_flops: FLOPs of one step, to count what is trained.
        kept: Steps whose states are kept.
        on_record: Told every new line of history.
        wants_stop: Whether to save and stop.
    """

    def __init__(
        self,
        states: States,
        *,
        start: Path | None,
        first_step: int,
        stop: int,
        step_flops: float,
        kept: Collection[int],
        on_record: Callable[[Record], None],
        wants_stop: Callable[[], bool],
    ) -> None:
        self._states, self._start, self._kept = states, start, kept
        self._on_record, self._wants_stop = on_record, wants_stop
        states.folder.mkdir(parents=True, exist_ok=True)
        self._from = states.newest(stop)
        self._lines: list[Record] = [] if self._from is None else list(states.history(self._from))
        self._counted, self._step_flops = first_step if self._from is None else self._from, step_flops

    def resume_from(self) -> Path | None:
        """The nearest state, else the one that the segment begins with."""
        return self._start if self._from is None else self._states.of(self._from)

    def checkpoint_folder(self, step: int) -> Path:
        """Aside."""
        return self._states.aside(step)

    def commit(self, folder: Path, step: int) -> None:
        """Adds the lines up to the step and gives the state its name."""
        lines = (line for line in self._lines if line["step"] <= step)
        (folder / HISTORY).write_text("".join(json.dumps(line) + "\n" for line in lines))
        if step in self._kept:
            (folder / KEEP).touch()
        self._states.add(folder, step)

    def log(self, record: Record) -> None:
        """Counts the steps since the last line, keeps the line for the states to come, and tells it."""
        self._states.count((record["step"] - self._counted) * self._step_flops)
        self._counted = record["step"]
        self._lines.append(record)
        self._on_record(record)

    def warn(self, text: str) -> None:
        """Leaves it to the log."""
        logger.warning(text)

    def rewind(self, step: int) -> None:
        """Nothing to forget: the lines begin with those of the state that was resumed from."""

    def save_verification(self, verification: Record) -> None:
        """Writes growth.json, the same for all states."""
        replace_file(self._states.folder / GROWTH, json.dumps(verification, indent=2))

    def stop_requested(self) -> bool:
        """Whether someone wants a stop."""
        return self._wants_stop()
