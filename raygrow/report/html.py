"""The report as one HTML file that needs nothing else: styles inside, figures as inline SVG."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from raygrow.report import plots
from raygrow.report.runs import load_runs
from raygrow.report.summary import summarize
from raygrow.weights.atomic import replace_file

TEMPLATE = "report.html.jinja"


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Writes `report.html` and, once a step has been reported, `loss.png` about run folders, finished or not.

    Args:
        runs: Run folders. The control of each (`<name>-scratch` beside it) is added by itself.
        out: Folder for the two files; made if missing.

    Returns:
        The path of `report.html`.

    Raises:
        FileNotFoundError: If a folder is no run folder.
        ValueError: If a file in a run folder is damaged.
    """
    loaded = load_runs(runs)
    begun = [run for run in loaded if run.history]
    environment = Environment(
        loader=PackageLoader("raygrow.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template(TEMPLATE).render(
        summary=summarize(loaded),
        figures=[plots.svg(panel, begun) for panel in plots.panels(begun)],
        folders=[str(run.path) for run in loaded],
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )
    out.mkdir(parents=True, exist_ok=True)
    if begun:
        plots.write_png(begun, out / "loss.png")
    replace_file(out / "report.html", page)
    return out / "report.html"
