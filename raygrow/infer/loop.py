"""An engine in a thread of its own, with asyncio on the outside."""

import asyncio
import contextlib
import itertools
import logging
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from raygrow.infer.engine import Engine, EngineStats
from raygrow.infer.request import Delta, Request, merged

logger = logging.getLogger(__name__)

STUCK_SECONDS = 120.0
"""A step that takes longer is stuck: even one that compiles kernels is done sooner."""

SWITCH_SECONDS = 0.0002
"""For how long other threads of Python may go on when the engine's is to: meanwhile the device has nothing to do."""

Caller = TypeVar("Caller")
"""Who has asked: whatever tells one request from all others."""
Item = Delta | BaseException
"""What is new for a caller; an error is the last."""


class EngineEnded(RuntimeError):
    """An engine is closed, or has failed: it takes no requests any more."""


class EngineThread(Generic[Caller]):
    """Steps an engine for as long as it has work.

    All threads of the process take turns more often from then on (`SWITCH_SECONDS`).

    When a step raises, every request that is in the engine ends with an error, and `check` raises from then on:
    what the engine holds can no longer be relied on.

    Args:
        engine: Nobody else may use it from now on.
        give: Takes what is new, for whom. Called in the engine's thread, between steps.
        stuck_seconds: See `check`.
    """

    def __init__(
        self, engine: Engine, give: Callable[[Sequence[tuple[Caller, Item]]], None], *, stuck_seconds: float
    ) -> None:
        self.engine, self._give = engine, give
        self._stuck_seconds = stuck_seconds
        self._wake = threading.Condition()
        self._inbox: deque[tuple[Caller, Request | None]] = deque()
        """What is to be done between steps: requests to begin, and callers that have gone."""
        self._requests: dict[Caller, str] = {}
        self._callers: dict[str, Caller] = {}
        self._closing = False
        self._failure: BaseException | None = None
        self._step_began: float | None = None
        sys.setswitchinterval(min(SWITCH_SECONDS, sys.getswitchinterval()))
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def begin(self, caller: Caller, request: Request) -> None:
        """Takes a request. What is wrong with it comes as an item.

        Raises:
            EngineEnded: If the engine is closed or has failed.
        """
        self._put(caller, request)

    def drop(self, caller: Caller) -> None:
        """Ends a request that nobody waits for any more."""
        with contextlib.suppress(EngineEnded):  # meanwhile
            self._put(caller, None)

    def check(self) -> None:
        """Says whether the engine is well.

        Raises:
            RuntimeError: If its thread has ended, or has been in one step for longer than `stuck_seconds`.
        """
        if self._failure is not None:
            raise RuntimeError(f"the engine has failed: {self._failure}") from self._failure
        if not self._thread.is_alive():
            raise RuntimeError("the engine is closed")
        began = self._step_began
        if began is not None and (seconds := time.monotonic() - began) > self._stuck_seconds:
            raise RuntimeError(f"the engine is stuck: one step has taken {seconds:.0f} seconds")

    def close(self) -> None:
        """Ends the thread after its step. Requests that are not finished end as aborted."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        self.engine.close()

    def _put(self, caller: Caller, request: Request | None) -> None:
        with self._wake:
            if self._closing or self._failure is not None:
                raise EngineEnded(
                    f"the engine has failed: {self._failure}" if self._failure else "the engine is closed"
                )
            self._inbox.append((caller, request))
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._serve_inbox():
                self._step_began = time.monotonic()
                deltas = self.engine.step()
                self._step_began = None
                self._give_out(deltas)
        except BaseException as error:
            logger.exception("the engine has failed")
            self._stop(error)
        else:
            self._stop(None)

    def _serve_inbox(self) -> bool:
        """Takes in what has come, waiting for it if there is nothing else to do. False when it is time to end."""
        with self._wake:
            while not (self._inbox or self._closing or self.engine.has_work):
                self._wake.wait()
            inbox, closing = list(self._inbox), self._closing
            self._inbox.clear()
        for caller, request in inbox:
            if request is None:
                self._abort(caller)
            else:
                self._begin(caller, request)
        return not closing

    def _begin(self, caller: Caller, request: Request) -> None:
        try:
            self.engine.add(request)
        except Exception as error:  # only its own: the engine has not taken it
            self._give([(caller, error)])
        else:
            self._requests[caller], self._callers[request.id] = request.id, caller

    def _abort(self, caller: Caller) -> None:
        id = self._requests.pop(caller, None)
        if id is not None:  # else it has ended, or was never taken: another one's may have its id
            del self._callers[id]
            self.engine.abort(id)

    def _give_out(self, deltas: list[Delta]) -> None:
        items = [(self._callers[delta.id], delta) for delta in deltas if delta.id in self._callers]
        for caller, delta in items:
            if delta.finish_reason is not None:
                del self._requests[caller], self._callers[delta.id]
        if items:
            self._give(items)

    def _stop(self, error: BaseException | None) -> None:
        """Ends every request, those in the inbox too."""
        with self._wake:
            self._closing, self._failure, self._step_began = True, error, None
            waiting = {caller: request.id for caller, request in self._inbox if request is not None}
            self._inbox.clear()
        ids = {**self._requests, **waiting}
        self._requests.clear()
        self._callers.clear()
        self._give([(caller, ending(id, error)) for caller, id in ids.items()])


def ending(id: str, error: BaseException | None) -> Delta:
    """The last of a request that has not ended by itself: the engine was closed, or has failed."""
    if error is None:
        return Delta(id, finish_reason="abort")
    return Delta(id, finish_reason="error", error=f"the engine has failed: {error}")


@dataclass(eq=False)
class Stream:
    """One caller who waits for the Deltas of a request."""

    request: Request
    number: int = field(default_factory=itertools.count().__next__)
    """Tells it from all others of this process."""
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    arrived: list[Item] = field(default_factory=list)
    """What the caller has not taken yet."""
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class Streams(ABC):
    """Answers of an engine somewhere else, for callers in any number of event loops."""

    async def generate(self, request: Request) -> AsyncGenerator[Delta]:
        """What is new of a request, as it comes: to a caller who takes his time, several steps' as one Delta.

        Closing the iterator aborts the request.

        Raises:
            ValueError: If the engine cannot take the request; before anything is given out.
            EngineEnded: If the engine is closed or has failed.
        """
        stream = Stream(request)
        self._begin(stream)
        ended = False
        try:
            while not ended:
                await stream.wake.wait()
                stream.wake.clear()
                arrived, stream.arrived = stream.arrived, []
                deltas = [item for item in arrived if isinstance(item, Delta)]
                if deltas:
                    ended = deltas[-1].finish_reason is not None
                    yield merged(deltas)
                if isinstance(arrived[-1], BaseException):
                    ended = True
                    raise arrived[-1]
        finally:
            if not ended:
                self._drop(stream)

    @abstractmethod
    def _begin(self, stream: Stream) -> None:
        """Asks the engine, which gives to `send` what comes of it."""

    @abstractmethod
    def _drop(self, stream: Stream) -> None:
        """Tells the engine that nobody waits any more."""


class EngineLoop(Streams):
    """An engine in a thread of this process. See `EngineThread`.

    Args:
        engine: Nobody else may use it from now on.
        stuck_seconds: See `EngineThread.check`.
    """

    def __init__(self, engine: Engine, *, stuck_seconds: float = STUCK_SECONDS) -> None:
        self._thread: EngineThread[Stream] = EngineThread(engine, send, stuck_seconds=stuck_seconds)

    @property
    def stats(self) -> EngineStats:
        """The engine's numbers of now; some of them may be those of a moment ago."""
        return self._thread.engine.stats

    def check(self) -> None:
        """Raises RuntimeError unless the engine is well."""
        self._thread.check()

    async def close(self) -> None:
        """Ends the thread after its step. Requests that are not finished end as aborted."""
        await asyncio.to_thread(self._thread.close)

    def _begin(self, stream: Stream) -> None:
        self._thread.begin(stream, stream.request)

    def _drop(self, stream: Stream) -> None:
        self._thread.drop(stream)


def send(items: Sequence[tuple[Stream, Item]]) -> None:
    """Brings items to their callers: one call into each event loop, however many there are."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Item]]] = {}
    for stream, item in items:
        by_loop.setdefault(stream.loop, []).append((stream, item))
    for loop, group in by_loop.items():
        with contextlib.suppress(RuntimeError):  # that event loop has ended, and its callers with it
            loop.call_soon_threadsafe(_deliver, group)


def _deliver(items: list[tuple[Stream, Item]]) -> None:
    for stream, item in items:
        stream.arrived.append(item)
        stream.wake.set()
