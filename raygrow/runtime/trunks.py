"""Who trains what trials share: one of them at a time, while the others wait for its states."""

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raygrow.train.shared import Segment, is_trained

BEAT_SECONDS = 1.0
EXPIRES_SECONDS = 15.0
"""A claim ends when its holder has not been heard of for so long: its process or node is lost."""
POLL_SECONDS = 0.2


class Process(NamedTuple):
    """A process that a trial has been given. A trial that has lost one gets another."""

    trial: str
    unique: str


@ray.remote(num_cpus=0)
class Trunks:
    """Hands out claims on segments by their keys, and knows the steps at which trials want to fork.

    Started again after a crash it has forgotten who trains what: then two may train the same, which costs FLOPs, but
    neither takes the states of the other away.
    """

    def __init__(self, wanted: dict[str, set[int]]) -> None:
        self._wanted = wanted
        self._holders: dict[str, tuple[Process, float]] = {}
        self._stopping = False

    def claim(self, key: str, step: int, who: Process) -> list[int] | None:
        """Asks for a segment up to `step`. Returns the steps to save at if it is now `who`'s to train, else None."""
        wanted = self._wanted.setdefault(key, set())
        wanted.add(step)
        holder = self._alive().get(key, who)
        if self._stopping or holder.trial != who.trial:  # of the same trial, the process before is lost
            return None
        self._holders[key] = (who, time.monotonic())
        return sorted(wanted)

    def beat(self, key: str, who: Process) -> bool:
        """Holds on to a claim. Returns whether its holder should save and stop."""
        if self._is_of(key, who):
            self._holders[key] = (who, time.monotonic())
        return self._stopping

    def release(self, key: str, who: Process) -> None:
        """Gives a claim back."""
        if self._is_of(key, who):
            del self._holders[key]

    def stop(self) -> int:
        """Has all who train save and stop, and hands out nothing more. Returns how many are still at it."""
        self._stopping = True
        return len(self._alive())

    def _is_of(self, key: str, who: Process) -> bool:
        return key in self._holders and self._holders[key][0] == who

    def _alive(self) -> dict[str, Process]:
        """Claims whose holders have been heard of."""
        now = time.monotonic()
        return {key: who for key, (who, heard) in self._holders.items() if now - heard < EXPIRES_SECONDS}


def open_trunks(trials: Iterable[Iterable[Segment]]) -> ActorHandle:
    """Starts the search's actor beside the driver, with the forks of the trials that are known."""
    wanted: dict[str, set[int]] = {}
    for segments in trials:
        for segment in segments:
            wanted.setdefault(segment.key, set()).add(segment.stop)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Trunks.options(scheduling_strategy=here, max_restarts=-1, max_task_retries=-1).remote(wanted)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Claim:
    """A segment that is this process's to train."""

    forks: list[int]
    """Steps to save at."""
    stop: threading.Event
    """Set when the search is to save and stop."""


@contextmanager
def claimed(segment: Segment, trunks: ActorHandle, states: Path, *, who: Process) -> Iterator[Claim | None]:
    """Waits until a segment is trained, which gives None, or is this process's to train while the body runs.

    Args:
        segment: What is needed.
        trunks: The search's actor.
        states: Folder of all states.
        who: This process.

    Yields:
        The claim, or None where there is nothing left to train.
    """
    while not is_trained(segment, states):
        forks: list[int] | None = ray.get(trunks.claim.remote(segment.key, segment.stop, who))
        if forks is not None:
            break
        time.sleep(POLL_SECONDS)
    else:
        yield None
        return
    claim, done = Claim(forks, threading.Event()), threading.Event()
    threading.Thread(target=_beat, args=(trunks, segment.key, who, claim, done), daemon=True).start()
    try:
        yield claim
    finally:
        done.set()
        trunks.release.remote(segment.key, who)


def _beat(trunks: ActorHandle, key: str, who: Process, claim: Claim, done: threading.Event) -> None:
    while not done.wait(BEAT_SECONDS):
        try:
            if ray.get(trunks.beat.remote(key, who)):
                claim.stop.set()
        except RayActorError:  # the driver is gone, and this process about to be ended
            return
