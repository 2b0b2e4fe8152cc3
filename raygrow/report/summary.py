"""What a report says, apart from how it looks: the verdict in words and the tables. HTML and terminal show the same."""

import logging
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from raygrow.evaluate.unigram import unigram_loss
from raygrow.report.compare import compare_runs, fair, headline, sentences
from raygrow.report.runs import Run
from raygrow.report.tables import (
    Table,
    checks_table,
    comparison_table,
    growth_table,
    metrics_table,
    phases_table,
    runs_table,
    settings_table,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Everything that a report says."""

    title: str
    headline: str
    outcome: str
    """`won`, `lost`, `tied`, or `open` while there is nothing to compare."""
    sentences: list[str]
    tables: list[Table]
    settings: Table
    commands: list[str] = field(default_factory=list)
    """What to do next, to copy into a shell."""
    next: str = "Train the best plan"
    """What these commands do."""


def summarize(runs: list[Run]) -> Summary:
    """The verdict and the tables of runs as `load_runs` gives them."""
    comparisons = compare_runs(runs)
    decisive = fair(comparisons)
    best = max(decisive, key=lambda c: c.gain, default=None)
    tables = [
        runs_table(runs),
        comparison_table(comparisons),
        growth_table(runs),
        checks_table(runs),
        phases_table(runs),
        metrics_table(runs),
    ]
    return Summary(
        title=runs[0].name,
        headline=headline(decisive) if best else "Nothing to compare yet",
        outcome=best.outcome if best else "open",
        sentences=[
            *_failures(runs),
            *([f"The best of them: {best.grown} against {best.scratch}."] if best and len(decisive) > 1 else []),
            *(sentences(best) if best else [_why_open(runs)]),
            *_against_unigram(runs),
        ],
        tables=[table for table in tables if table.rows],
        settings=settings_table(runs),
    )


def _failures(runs: list[Run]) -> list[str]:
    return [
        f"{run.name} failed: {run.summary.get('reason') or 'no reason was recorded'}"
        for run in runs
        if run.status == "failed"
    ]


def _why_open(runs: list[Run]) -> str:
    if all(run.is_grown for run in runs):
        return "There is no run from scratch to compare with: control=true trains one."
    if not any(run.is_grown for run in runs):
        return "No run grows, so there is nothing to compare."
    return "A verdict needs an evaluation of the grown run and of the one from scratch."


def _against_unigram(runs: list[Run]) -> list[str]:
    """How far the first run has come from knowing no more than how frequent each token is."""
    loss, data = runs[0].last("val_loss"), _data_folder(runs[0])
    unigram = _unigram_loss(data) if data else None
    if loss is None or unigram is None:
        return []
    side = "below" if loss < unigram else "ABOVE"
    return [
        f"{runs[0].name} stands at {loss:.3f}, {abs(unigram - loss):.2f} nats {side} the {unigram:.3f} that token "
        f"frequencies alone would give."
    ]


def _data_folder(run: Run) -> Path | None:
    """Where the run's data lies, if that can be told: a relative path starts where a relative `storage_path` does."""
    data, storage = Path((run.settings.get("data") or {}).get("path", "")), Path(run.settings.get("storage_path", ""))
    if data.is_absolute():
        return data
    starts = (folder for folder in run.path.parents if folder / storage == run.path.parent)
    return None if storage.is_absolute() else next((start / data for start in starts), None)


@cache
def _unigram_loss(data: Path) -> float | None:
    """None for data that is not on the machine where its run is looked at, which is said once."""
    try:
        return unigram_loss(data)
    except (FileNotFoundError, ValueError) as error:
        logger.info("no unigram loss in the report: %s", error)
        return None
