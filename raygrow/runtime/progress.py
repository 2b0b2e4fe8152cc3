"""One progress bar for whatever counts: documents, tensors, sequences."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Report(Protocol):
    """Called as work goes on: how much is done, of how much, and of what."""

    def __call__(self, done: int, total: int, what: str = ..., /) -> None: ...


@contextmanager
def progress_bar(what: str) -> Iterator[Report]:
    """Shows a bar on standard error while the body runs, and one for every other `what` that is reported.

    Args:
        what: The name of the work, where a report gives none.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=Console(stderr=True))
    tasks: dict[str, TaskID] = {}

    def report(done: int, total: int, what: str = what, /) -> None:
        if what not in tasks:
            bars.start()
            tasks[what] = bars.add_task(what)
        bars.update(tasks[what], completed=done, total=total)

    try:
        yield report
    finally:
        if tasks:
            bars.stop()
