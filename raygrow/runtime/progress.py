"""Progress bars for whatever counts: documents, tensors, sequences."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from raygrow.progress import Progress


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Shows a bar on standard error for everything that is counted while the body runs."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars = Bars(*columns, console=Console(stderr=True))
    tasks: dict[str, TaskID] = {}

    def report(done: int, total: int, what: str) -> None:
        if what not in tasks:
            bars.start()
            tasks[what] = bars.add_task(what)
        bars.update(tasks[what], completed=done, total=total)

    try:
        yield report
    finally:
        if tasks:
            bars.stop()
