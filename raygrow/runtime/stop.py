"""Stopping a run from outside: SIGTERM and Ctrl-C become a wish that training hears at its next report."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopWish:
    """Whether someone wants the run to save a checkpoint and stop."""

    def __init__(self) -> None:
        self.made = False


@contextmanager
def stop_wish() -> Iterator[StopWish]:
    """Takes the first SIGTERM or Ctrl-C as a wish while the body runs; another one does what it always did.

    Outside the main thread, where Python takes no signals, nothing is ever wished.
    """
    wish = StopWish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return

    def listen(number: int, frame: FrameType | None) -> None:
        wish.made = True
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, listen) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield wish
    finally:
        restore()
