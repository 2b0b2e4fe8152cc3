"""The report as one HTML file that needs nothing else: styles inside, figures as inline SVG."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from raygrow.report import plots, search_plots
from raygrow.report.best_plan import BEST, FORMULA, write_plan
from raygrow.report.pipeline import Pipeline, are_pipelines, load_pipeline
from raygrow.report.pipeline_summary import pipeline_panels, summarize_pipeline
from raygrow.report.runs import load_runs
from raygrow.report.search import Search, are_searches, load_search
from raygrow.report.search_summary import plan_name, summarize_search
from raygrow.report.summary import Summary, summarize
from raygrow.weights.atomic import replace_file

TEMPLATE = "report.html.jinja"
PICTURE = ("losses", "speedups", "budgets")
"""Panels of a search that are in its picture."""
PIPELINE_PICTURE = ("draw_loss", "draw_close_up", "draw_sparsity")


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Writes `report.html` about run folders, finished or not, searches or a pipeline, with a picture beside it.

    The picture is `loss.png`, once a step has been reported; of a search it is `search.png`, once a grown trial has
    finished, and the best plan comes with it (`best/`); of a pipeline it is `pipeline.png`.

    Args:
        runs: Run folders, folders of searches, or that of a pipeline. The control of a run (`<name>-scratch` beside it)
            is added by itself.
        out: Folder for the files; made if missing.

    Returns:
        The path of `report.html`.

    Raises:
        FileNotFoundError: If a folder is no run folder.
        ValueError: If a file in a folder is damaged, or runs and searches are mixed.
    """
    if are_pipelines(runs):
        return _write_pipeline_report(load_pipeline(runs[0]), out)
    if are_searches(runs):
        return _write_search_report(load_search(runs), out)
    loaded = load_runs(runs)
    begun = [run for run in loaded if run.history]
    figures = [plots.svg(draw, name) for name, draw in plots.panels(begun).items()]
    out.mkdir(parents=True, exist_ok=True)
    if begun:
        plots.write_png(begun, out / "loss.png")
    return _write_page(out, summarize(loaded), figures, [run.path for run in loaded])


def _write_search_report(search: Search, out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    panels = search_plots.panels(search)
    if panels:
        plots.write_panels([panels[name] for name in PICTURE if name in panels], out / "search.png")
    plans = (
        (BEST, search.best_trial, "The best plan"),
        (FORMULA, search.formula_trial, "The published formula's timing"),
    )
    for plan, trial, what in plans:
        if search.best_trial and trial and trial.run:
            name, text = plan_name(search, plan), f"{what}, of the search {search.name}."
            write_plan(trial.run, out, plan=plan, name=name, text=text)
    figures = [plots.svg(draw, name) for name, draw in panels.items()]
    return _write_page(out, summarize_search(search, out), figures, search.folders)


def _write_pipeline_report(pipeline: Pipeline, out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    panels = pipeline_panels(pipeline)
    if panels:
        plots.write_panels([panels[name] for name in PIPELINE_PICTURE if name in panels], out / "pipeline.png")
    figures = [plots.svg(draw, name) for name, draw in panels.items()]
    return _write_page(out, summarize_pipeline(pipeline), figures, [pipeline.path])


def _write_page(out: Path, summary: Summary, figures: Sequence[str], folders: Sequence[Path]) -> Path:
    environment = Environment(
        loader=PackageLoader("raygrow.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template(TEMPLATE).render(
        summary=summary,
        figures=figures,
        folders=[str(folder) for folder in folders],
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )
    replace_file(out / "report.html", page)
    return out / "report.html"
