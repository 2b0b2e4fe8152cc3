"""An engine in a thread of its own, with asyncio on the outside."""

import asyncio
import contextlib
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from raygrow.infer.engine import Engine, EngineStats
from raygrow.infer.request import Delta, Request, merged

logger = logging.getLogger(__name__)

STUCK_SECONDS = 120.0
"""A step that takes longer is stuck: even one that compiles kernels is done sooner."""

SWITCH_SECONDS = 0.0002
"""For how long other threads of Python may go on when the engine's is to: meanwhile the device has nothing to do."""


@dataclass(eq=False)
class _Stream:
    """One caller who waits for the Deltas of a request."""

    request: Request
    loop: asyncio.AbstractEventLoop
    arrived: list[Delta | BaseException] = field(default_factory=list)
    """What the caller has not taken yet; an error is the last."""
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    gone: bool = False
    """Nobody waits any more."""


class EngineLoop:
    """Steps an engine for as long as it has work. Requests may come from any number of event loops.

    All threads of the process take turns more often from then on (`SWITCH_SECONDS`).

    When a step raises, every request that is in the engine ends with an error, and `check` raises from then on:
    what the engine holds can no longer be relied on.

    Args:
        engine: Nobody else may use it from now on.
        stuck_seconds: See `check`.
    """

    def __init__(self, engine: Engine, *, stuck_seconds: float = STUCK_SECONDS) -> None:
        self.engine = engine
        self._stuck_seconds = stuck_seconds
        self._wake = threading.Condition()
        self._inbox: deque[_Stream] = deque()
        """What is to be done between steps: streams to begin, and to end those that are gone."""
        self._streams: dict[str, _Stream] = {}
        self._closing = False
        self._failure: BaseException | None = None
        self._step_began: float | None = None
        sys.setswitchinterval(min(SWITCH_SECONDS, sys.getswitchinterval()))
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> EngineStats:
        """The engine's numbers of now; some of them may be those of a moment ago."""
        return self.engine.stats

    async def generate(self, request: Request) -> AsyncGenerator[Delta]:
        """What is new of a request, as it comes: to a caller who takes his time, several steps' as one Delta.

        Closing the iterator aborts the request.

        Raises:
            ValueError: If the engine cannot take the request; before anything is given out.
            RuntimeError: If the loop is closed or has failed.
        """
        self.engine.check(request)
        stream = _Stream(request, asyncio.get_running_loop())
        self._put(stream)
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
                stream.gone = True
                with contextlib.suppress(RuntimeError):  # closed meanwhile
                    self._put(stream)

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

    async def close(self) -> None:
        """Ends the thread after its step. Requests that are not finished end as aborted."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)
        self.engine.close()

    def _put(self, stream: _Stream) -> None:
        with self._wake:
            if self._closing or self._failure is not None:
                raise RuntimeError(
                    f"the engine has failed: {self._failure}" if self._failure else "the engine is closed"
                )
            self._inbox.append(stream)
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
            streams, closing = list(self._inbox), self._closing
            self._inbox.clear()
        for stream in streams:
            if stream.gone:
                self._abort(stream)
            else:
                self._begin(stream)
        return not closing

    def _begin(self, stream: _Stream) -> None:
        try:
            self.engine.add(stream.request)
        except Exception as error:  # only its own: the engine has not taken it
            _send([(stream, error)])
        else:
            self._streams[stream.request.id] = stream

    def _abort(self, stream: _Stream) -> None:
        id = stream.request.id
        if self._streams.get(id) is stream:  # another one's may have this id by now, or have had it before
            del self._streams[id]
            self.engine.abort(id)

    def _give_out(self, deltas: list[Delta]) -> None:
        known = [(self._streams[delta.id], delta) for delta in deltas if delta.id in self._streams]
        for stream, delta in known:
            if delta.finish_reason is not None:
                del self._streams[stream.request.id]
        _send(known)

    def _stop(self, error: BaseException | None) -> None:
        """Ends every request, those in the inbox too."""
        with self._wake:
            self._closing, self._failure, self._step_began = True, error, None
            waiting = list(self._inbox)
            self._inbox.clear()
        reason, text = ("abort", None) if error is None else ("error", f"the engine has failed: {error}")
        streams = [*self._streams.values(), *waiting]
        self._streams.clear()
        _send([(stream, Delta(stream.request.id, finish_reason=reason, error=text)) for stream in streams])


def _send(items: Sequence[tuple[_Stream, Delta | BaseException]]) -> None:
    """Brings items to their callers: one call into each event loop, however many there are."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, Delta | BaseException]]] = {}
    for stream, item in items:
        by_loop.setdefault(stream.loop, []).append((stream, item))
    for loop, group in by_loop.items():
        with contextlib.suppress(RuntimeError):  # that event loop has ended, and its callers with it
            loop.call_soon_threadsafe(_deliver, group)


def _deliver(items: list[tuple[_Stream, Delta | BaseException]]) -> None:
    for stream, item in items:
        stream.arrived.append(item)
        stream.wake.set()
