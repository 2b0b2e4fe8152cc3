"""An engine in a process of its own, with asyncio on this side.

Threads of one Python process take turns, and an engine's must not wait for one: meanwhile its device has nothing to do.
So whatever costs time for every request and for every piece of an answer stays out of the engine's process, which
writes one message for all that a step has brought.
"""

import asyncio
import contextlib
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
from raygrow.infer.loop import STUCK_SECONDS, EngineThread, Item, Stream, Streams, ending, send
from raygrow.infer.request import Delta

logger = logging.getLogger(__name__)

HANGING_SECONDS = 300
"""A process whose Python has not come to answer a question for this long ends itself."""
SECONDS_TO_END = 10.0
CHILD = "import sys; from raygrow.infer.process import serve; serve(int(sys.argv[1]))"


class EngineProcess(Streams):
    """An engine in a process that ends with this one. When it ends by itself, every request ends with an error.

    Args:
        load: Makes the engine, in that process. Must be picklable.

    Raises:
        Exception: What `load` raises.
        RuntimeError: If the process ends meanwhile.
    """

    def __init__(self, load: Callable[[], Engine]) -> None:
        self._pipe, theirs = Pipe()
        self._process = _start(theirs)
        self._sending, self._lock = threading.Lock(), threading.Lock()
        self._streams: dict[int, Stream] = {}
        self._asked: deque[Future[EngineStats]] = deque()
        """Who waits for numbers: they come in the order in which they were asked for."""
        self._closed, self._failure = False, ""
        try:
            _write(self._pipe, load)
            problem = _read(self._pipe)
        except (EOFError, OSError) as error:
            raise RuntimeError(f"the engine did not start: {self._ended()}") from error
        except BaseException:
            self._process.kill()
            raise
        if problem is not None:
            raise problem
        threading.Thread(target=self._receive, name="answers", daemon=True).start()

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
        if self._closed:
            raise RuntimeError("the engine is closed")
        if self._failure:
            raise RuntimeError(f"the engine has failed: {self._failure}")

    def _tell(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # the process has ended, as who waits is told
            _write(self._pipe, message)

    def _receive(self) -> None:
        """Brings what comes from the process to who waits for it. In a thread, until there is no process any more."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                message = _read(self._pipe)
                if isinstance(message, list):
                    self._give(message)
                else:
                    _settle(self._asked.popleft(), message)
        failure = self._ended()
        with self._lock:
            self._failure = failure
            streams, asked = list(self._streams.values()), list(self._asked)
            self._streams.clear()
        error = None if self._closed else RuntimeError(failure)
        send([(stream, ending(stream.request.id, error)) for stream in streams])
        for answer in asked:
            _settle(
                answer, RuntimeError("the engine is closed" if self._closed else f"the engine has failed: {failure}")
            )

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


def _start(pipe: Connection) -> subprocess.Popen:
    """The process that `serve` runs in, at the other end of a pipe."""
    # modules may have been found in places that only this process knows
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    number = pipe.fileno()
    with pipe:
        return subprocess.Popen([sys.executable, "-c", CHILD, str(number)], pass_fds=[number], env=environment)


def serve(descriptor: int) -> None:
    """The engine's process.

    Args:
        descriptor: Its end of the pipe.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all, and the other process says when to end
    pipe = Connection(descriptor)
    with contextlib.suppress(EOFError, OSError):
        try:
            engine = _read(pipe)()
        except Exception as error:
            logger.exception("the engine did not start")
            _write(pipe, _portable(error))
            raise EOFError from error
        gc.collect()
        gc.freeze()  # what is there stays, and looking through it takes longer than a step
        _write(pipe, None)
        _answer(engine, pipe)
    os._exit(0)  # at once: nothing of it is kept, and the device may be at a step


def _answer(engine: Engine, pipe: Connection) -> None:
    """Does what the other process asks for, until it has gone."""
    sending = threading.Lock()

    def give(items: Sequence[tuple[int, Item]]) -> None:
        news = [(number, tuple(item)[1:] if isinstance(item, Delta) else _portable(item)) for number, item in items]
        with sending, contextlib.suppress(OSError):
            _write(pipe, news)

    thread: EngineThread[int] = EngineThread(engine, give, stuck_seconds=STUCK_SECONDS)
    while True:
        match _read(pipe):
            case None:
                faulthandler.dump_traceback_later(HANGING_SECONDS, exit=True)  # by a thread that needs no Python
                with sending:
                    _write(pipe, _stats(thread))
            case number, None:
                thread.drop(number)
            case number, request:
                try:
                    thread.begin(number, request)
                except RuntimeError as error:
                    give([(number, error)])


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
