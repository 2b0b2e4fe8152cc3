"""The report's verdict and tables on the terminal."""

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table as RichTable

from raygrow.report.runs import load_runs
from raygrow.report.summary import Table, summarize

SHOWN = ("Runs", "Speedup at equal loss", "Growth")
"""Tables that fit a terminal; the HTML report has all of them."""

COLORS = {"won": "green", "lost": "red", "tied": "yellow", "open": "cyan"}


def print_summary(runs: Sequence[Path], console: Console | None = None) -> None:
    """Prints what came out of run folders: the verdict in words, then the main tables.

    Args:
        runs: Run folders. The control of each (`<name>-scratch` beside it) is added by itself.
        console: Where to print; standard output when not given.

    Raises:
        FileNotFoundError: If a folder is no run folder.
        ValueError: If a file in a run folder is damaged.
    """
    console = console or Console(highlight=False)
    summary = summarize(load_runs(runs))
    console.print(f"\n[bold {COLORS[summary.outcome]}]{escape(summary.headline)}[/]")
    for sentence in summary.sentences:
        console.print(escape(sentence))
    for table in summary.tables:
        if table.title in SHOWN:
            console.print(_fitting(table, console))


def _fitting(table: Table, console: Console) -> RichTable:
    """The table, or where the terminal is too narrow for it the table turned on its side; wrapped if neither fits."""

    def measured(shown: RichTable) -> Measurement:
        return Measurement.get(console, console.options.update(max_width=1000), shown)

    upright = [table.header, *table.rows]
    layouts = upright, list(zip(*upright, strict=True))
    for rows in layouts:
        if measured(shown := _rich(table.title, rows)).maximum <= console.width:
            return shown
    return min((_rich(table.title, rows, wrap=True) for rows in layouts), key=lambda shown: measured(shown).minimum)


def _rich(title: str, rows: Sequence[Sequence[str]], *, wrap: bool = False) -> RichTable:
    """A table from its header and rows, figures to the right; long cells stay whole unless they are to `wrap`."""
    shown = RichTable(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, name in enumerate(rows[0]):
        shown.add_column(escape(name), justify="right" if i else "left", no_wrap=not (wrap and i))
    for row in rows[1:]:
        shown.add_row(*(escape(cell) for cell in row))
    return shown
