"""Functions that run in a process of their own, on a machine that has what they need, and say how far they are."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from raygrow.progress import Progress

POLL_SECONDS = 0.2


class _Process:
    """Calls a function in one thread, and answers in another how far it is."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._told: dict[str, tuple[int, int]] = {}

    def call(self, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        torch.set_num_threads(self._threads)

        def progress(done: int, total: int, what: str) -> None:
            self._told[what] = done, total

        return function(**arguments, progress=progress)

    def told(self) -> dict[str, tuple[int, int]]:
        return dict(self._told)


class Elsewhere:
    """A process with as much of the cluster as one that trains.

    Args:
        cpus: Its cores.
        use_gpu: Whether it has a GPU.
    """

    def __init__(self, *, cpus: float, use_gpu: bool) -> None:
        options: Any = {"max_concurrency": 2, "num_cpus": cpus, "num_gpus": int(use_gpu)}
        self._process: Any = ray.remote(**options)(_Process).remote(max(1, int(cpus)))

    def call(self, function: Callable[..., Any], *, progress: Progress, **arguments: Any) -> Any:
        """What a function gives, which also takes `progress`.

        Raises:
            ValueError: If the function does, or its process is lost.
            OSError: If the function does.
        """
        answer = self._process.call.remote(function, arguments)
        try:
            while not ray.wait([answer], timeout=POLL_SECONDS)[0]:
                self._pass_on(progress)
            self._pass_on(progress)
            return ray.get(answer)
        except RayTaskError as error:
            if isinstance(error.cause, ValueError | OSError):
                raise error.cause from None
            raise
        except RayActorError as error:
            raise ValueError(
                "the process that worked on it was lost, perhaps for lack of memory; starting again goes on from "
                "what is finished"
            ) from error

    def _pass_on(self, progress: Progress) -> None:
        told: Any = ray.get(self._process.told.remote())
        for what, (done, total) in told.items():
            progress(done, total, what)

    def end(self) -> None:
        """Ends the process."""
        ray.kill(self._process)


@contextmanager
def elsewhere(*, cpus: float, use_gpu: bool) -> Iterator[Elsewhere]:
    """Such a process, for the time of the body."""
    process = Elsewhere(cpus=cpus, use_gpu=use_gpu)
    try:
        yield process
    finally:
        process.end()
