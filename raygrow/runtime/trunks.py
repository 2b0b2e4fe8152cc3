"""Who trains what trials share: one of them at a time, while the others wait for its states."""

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raygrow.train.shared import Segment, is_trained

BEAT_SECONDS = 2.0
EXPIRES_SECONDS = 15.0
"""A claim ends when its holder has not been heard of for so long: its process or node is lost."""
POLL_SECONDS = 0.2


@ray.remote(num_cpus=0)
class Trunks:
    """Hands out claims on segments by their keys, and knows the steps at which trials want to fork.

    Started again after a crash it has forgotten who trains what: then two may train the same, which does no harm.
    """

    def __init__(self, wanted: dict[str, set[int]]) -> None:
        self._wanted = wanted
        self._holders: dict[str, tuple[str, float]] = {}

    def claim(self, key: str, step: int, who: str) -> list[int] | None:
        """Asks for a segment up to `step`. Returns the steps to save at if it is now `who`'s to train, else None."""
        wanted = self._wanted.setdefault(key, set())
        wanted.add(step)
        holder, heard = self._holders.get(key, (who, 0.0))
        if holder != who and time.monotonic() - heard < EXPIRES_SECONDS:
            return None
        self._holders[key] = (who, time.monotonic())
        return sorted(wanted)

    def beat(self, key: str, who: str) -> None:
        """Holds on to a claim."""
        if self._holders.get(key, ("", 0.0))[0] == who:
            self._holders[key] = (who, time.monotonic())

    def release(self, key: str, who: str) -> None:
        """Gives a claim back."""
        if self._holders.get(key, ("", 0.0))[0] == who:
            del self._holders[key]


def open_trunks(trials: Iterable[Iterable[Segment]]) -> ActorHandle:
    """Starts the search's actor beside the driver, with the forks of the trials that are known."""
    wanted: dict[str, set[int]] = {}
    for segments in trials:
        for segment in segments:
            wanted.setdefault(segment.key, set()).add(segment.stop)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Trunks.options(scheduling_strategy=here, max_restarts=-1, max_task_retries=-1).remote(wanted)  # pyright: ignore[reportReturnType]


@contextmanager
def claimed(segment: Segment, trunks: ActorHandle, states: Path, *, who: str) -> Iterator[list[int] | None]:
    """Waits until a segment is trained, which gives None, or is this process's to train while the body runs.

    Args:
        segment: What is needed.
        trunks: The search's actor.
        states: Folder of all states.
        who: Names this process.

    Yields:
        The steps to save at, or None where there is nothing left to train.
    """
    while not is_trained(segment, states):
        forks: list[int] | None = ray.get(trunks.claim.remote(segment.key, segment.stop, who))
        if forks is not None:
            break
        time.sleep(POLL_SECONDS)
    else:
        yield None
        return
    done = threading.Event()
    threading.Thread(target=_beat, args=(trunks, segment.key, who, done), daemon=True).start()
    try:
        yield forks
    finally:
        done.set()
        trunks.release.remote(segment.key, who)


def _beat(trunks: ActorHandle, key: str, who: str, done: threading.Event) -> None:
    while not done.wait(BEAT_SECONDS):
        trunks.beat.remote(key, who)
