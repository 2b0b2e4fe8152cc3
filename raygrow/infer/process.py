"""An engine in a process of its own, with asyncio on this side.

Threads of one Python process take turns, and an engine's must not wait for one: meanwhile its device has nothing to do.
So whatever costs time for every request and for every piece of an answer stays out of the engine's process, which
writes one message for all that a step has brought.
"""

import asyncio
import contextlib
import ctypes
import faulthandler
import gc
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from raygrow.infer.engine import Engine, EngineStats
from raygrow.infer.loop import STUCK_SECONDS, EngineEnded, EngineThread, Item, Stream, Streams, ending, send
from raygrow.infer.request import Delta

logger = logging.getLogger(__name__)

HANGING_SECONDS = 300
"""A process whose Python has not come to look for a question for this long ends itself."""
SECONDS_TO_END = 10.0
CHILD = "import sys; sys.path[:] = {path}; from raygrow.infer.process import serve; serve({pipe}, {parent})"
PARENT_DEATH_SIGNAL = 1
"""Of prctl(2)."""


class EngineProcess(Streams):
    """An engine in a process that ends with this one. When it ends by itself, every request ends with an error.

    Args:
        load: Makes the engine, in that process. Must be picklable.

    Raises:
        Exception: What `load` raises.
        RuntimeError: If the process ends meanwhile.
    """

    def __init__(self, load: Callable[[], Engine]) -> None:
        self._sending, self._lock = threading.Lock(), threading.Lock()
        self._streams: dict[int, Stream] = {}
        self._asked: deque[Future[EngineStats]] = deque()
        """Who waits for numbers: they come in the order in which they were asked for."""
        self._closed, self._failure = False, ""
        started: Future[None] = Future()
        threading.Thread(target=self._run, args=(load, started), name="engine's answers", daemon=True).start()
        started.result()

    async def stats(self) -> EngineStats:
        """The engine's numbers of now.

        Raises:
            RuntimeError: If the engine is not well; see `EngineThread.check`.
        """
        answer: Future[EngineStats] = Future()
        with self._sending:  # so that answers come in the order in which they stand there
            with self._lock:
                self._check()
                self._asked.append(answer)
            self._tell(None)
        return await asyncio.wrap_future(answer)

    async def close(self) -> None:
        """Ends the process. Requests that are not finished end as aborted."""
        self._closed = True
        self._process.terminate()
        await asyncio.to_thread(self._ended)

    def _begin(self, stream: Stream) -> None:
        with self._lock:
            self._check()
            self._streams[stream.number] = stream
        with self._sending:
            self._tell((stream.number, stream.request))

    def _drop(self, stream: Stream) -> None:
        with self._lock:
            known = self._streams.pop(stream.number, None)
        if known is not None:
            with self._sending:
                self._tell((stream.number, None))

    def _check(self) -> None:
        if self._closed or self._failure:
            raise self._problem()

    def _problem(self) -> EngineEnded:
        return EngineEnded("the engine is closed" if self._closed else f"the engine has failed: {self._failure}")

    def _tell(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # the process has ended, as who waits is told
            _write(self._pipe, message)

    def _run(self, load: Callable[[], Engine], started: Future) -> None:
        """Starts the process, and stays with it to its end: when this thread goes, the process does."""
        try:
            self._start(load)
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        try:
            with contextlib.suppress(EOFError, OSError):
                self._receive()
        finally:
            self._lose(self._ended())

    def _start(self, load: Callable[[], Engine]) -> None:
        self._pipe, theirs = Pipe()
        with theirs:
            number = theirs.fileno()
            # modules may be in places that only this process knows
            code = CHILD.format(path=sys.path, pipe=number, parent=os.getpid())
            self._process = subprocess.Popen([sys.executable, "-c", code], pass_fds=[number])
        try:
            _write(self._pipe, load)
            problem = _read(self._pipe)
        except (EOFError, OSError) as error:
            raise RuntimeError(f"the engine did not start: {self._ended()}") from error
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        if problem is not None:
            self._ended()
            raise problem

    def _receive(self) -> None:
        """Brings what comes from the process to who waits for it."""
        while True:
            message = _read(self._pipe)
            if isinstance(message, list):
                self._give(message)
            else:
                _settle(self._asked.popleft(), message)

    def _lose(self, failure: str) -> None:
        """Tells everybody who waits that there is no process any more."""
        with self._lock:
            self._failure = failure
            streams, asked = list(self._streams.values()), list(self._asked)
            self._streams.clear()
        error = None if self._closed else RuntimeError(failure)
        send([(stream, ending(stream.request.id, error)) for stream in streams])
        for answer in asked:
            _settle(answer, self._problem())

    def _give(self, news: list[tuple[int, Any]]) -> None:
        items: list[tuple[Stream, Item]] = []
        with self._lock:
            for number, new in news:
                stream = self._streams.get(number)
                if stream is None:  # its caller has gone, and the engine does not know yet
                    continue
                item = Delta(stream.request.id, *new) if isinstance(new, tuple) else new
                if isinstance(item, BaseException) or item.finish_reason is not None:
                    del self._streams[number]
                items.append((stream, item))
        send(items)

    def _ended(self) -> str:
        """Waits for the end of the process. Says how it was."""
        try:
            status = self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        return f"its process has ended (exit status {status})"


def serve(descriptor: int, parent: int) -> None:
    """The engine's process.

    Args:
        descriptor: Its end of the pipe.
        parent: The process at the other end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all, and the other process says when to end
    if sys.platform == "linux":  # elsewhere the end of the pipe has to do, which a process that hangs does not see
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before it could be said that this one is to end with it
        os._exit(0)
    logging.basicConfig(format="%(message)s")  # to stderr, as the other process's
    logging.getLogger("raygrow").setLevel(logging.INFO)
    pipe = Connection(descriptor)
    with contextlib.suppress(EOFError, OSError):
        engine = _load(pipe)
        if engine is not None:
            _answer(engine, pipe)
    os._exit(0)  # at once: nothing of it is kept, and the device may be at a step


def _load(pipe: Connection) -> Engine | None:
    """Makes the engine. Says when it is there, or why there is none."""
    try:
        engine = _read(pipe)()
    except Exception as error:
        logger.exception("the engine did not start")
        _write(pipe, _portable(error))
        return None
    gc.collect()
    gc.freeze()  # what is there stays, and looking through all of it takes longer than a step
    _write(pipe, None)
    return engine


def _answer(engine: Engine, pipe: Connection) -> None:
    """Does what the other process asks for, until it has gone."""
    sending = threading.Lock()

    def give(items: Sequence[tuple[int, Item]]) -> None:
        news = [(number, tuple(item)[1:] if isinstance(item, Delta) else _portable(item)) for number, item in items]
        with sending, contextlib.suppress(OSError):
            _write(pipe, news)

    thread: EngineThread[int] = EngineThread(engine, give, stuck_seconds=STUCK_SECONDS)
    while True:
        _watch()  # all is well as long as it comes here, whether or not anybody asks for something
        if not pipe.poll(HANGING_SECONDS / 3):
            continue
        match _read(pipe):
            case None:
                with sending:
                    _write(pipe, _stats(thread))
            case number, None:
                thread.drop(number)
            case number, request:
                try:
                    thread.begin(number, request)
                except EngineEnded as error:
                    give([(number, error)])


def _watch() -> None:
    """Ends this process unless it is called again in time."""
    faulthandler.dump_traceback_later(HANGING_SECONDS, exit=True)  # by a thread that needs no Python


def _stats(thread: EngineThread) -> EngineStats | RuntimeError:
    try:
        thread.check()
    except RuntimeError as error:
        return RuntimeError(str(error))  # without its cause, which need not be picklable
    return thread.engine.stats


def _portable(error: BaseException) -> BaseException:
    """An error that can be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _settle(answer: Future, value: Any) -> None:
    if not answer.set_running_or_notify_cancel():  # nobody waits any more
        return
    if isinstance(value, BaseException):
        answer.set_exception(value)
    else:
        answer.set_result(value)


def _write(pipe: Connection, message: Any) -> None:
    pipe.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))  # `Connection.send` pickles in Python


def _read(pipe: Connection) -> Any:
    return pickle.loads(pipe.recv_bytes())
