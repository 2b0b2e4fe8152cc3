"""The report's verdict and tables on the terminal."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table as RichTable

from raygrow.report.pipeline import are_pipelines, load_pipeline
from raygrow.report.pipeline_summary import summarize_pipeline
from raygrow.report.runs import load_runs
from raygrow.report.search import are_searches, load_search
from raygrow.report.search_summary import summarize_search
from raygrow.report.summary import summarize
from raygrow.report.tables import Table

SHOWN = ("Stages", "Sparsity", "Runs", "Speedup at equal loss", "Growth", "Settings", "The timing formula, refitted")
"""Tables that fit a terminal; the HTML report has all of them."""

MOST_ROWS = 12
"""Rows of a table on a terminal."""

COLORS = {"won": "green", "lost": "red", "tied": "yellow", "open": "cyan"}


def print_summary(runs: Sequence[Path], console: Console | None = None, *, out: Path | None = None) -> None:
    """Prints what came out of run folders, searches or a pipeline: the verdict in words, then the main tables.

    Args:
        runs: Run folders, folders of searches, or that of a pipeline. The control of a run (`<name>-scratch` beside it)
            is added by itself.
        console: Where to print; standard output when not given.
        out: Where the report with the best plan of a search is; the first folder when not given.

    Raises:
        FileNotFoundError: If a folder is no run folder.
        ValueError: If a file in a folder is damaged, or runs and searches are mixed.
    """
    console = console or Console(highlight=False)
    if are_pipelines(runs):
        summary = summarize_pipeline(load_pipeline(runs[0]))
    elif are_searches(runs):
        summary = summarize_search(load_search(runs), out or runs[0])
    else:
        summary = summarize(load_runs(runs))
    console.print(f"\n[bold {COLORS[summary.outcome]}]{escape(summary.headline)}[/]")
    for sentence in summary.sentences:
        console.print(escape(sentence))
    for table in summary.tables:
        if table.title.partition(", at ")[0] in SHOWN:
            console.print(_fitting(_shortened(table), console))
    for command in summary.commands:
        console.print(f"  {command}", markup=False, soft_wrap=True)


def _shortened(table: Table) -> Table:
    """The first rows, and those that have a name and not a number, such as the control's."""
    rows = [row for i, row in enumerate(table.rows) if i < MOST_ROWS or not row[0].isdigit()]
    return replace(table, rows=rows)


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
