"""Trials of a search as settings that `raygrow train plan=best` composes: plan, model and data."""

from pathlib import Path
from typing import Any

import yaml

from raygrow.report.runs import Run
from raygrow.weights.atomic import replace_file

BEST = "best"
"""Name of the folder beside the report, and of the best trial's file in each group."""
FORMULA = "formula"
"""Name of the plan with the published formula's timing, beside it."""
HEADER = """\
# @package _global_
# {text}
defaults:
  - override /model: {plan}
  - override /data: {plan}

"""


def write_plan(run: Run, out: Path, *, plan: str, name: str, text: str) -> Path:
    """Writes `best/plan/<plan>.yaml` with the model and data that it brings along, as plans in raygrow/conf may.

    Args:
        run: The trial to make settings of.
        out: Folder to put `best` into.
        plan: `best` or `formula`.
        name: What runs of the plan are called when they are not given a name.
        text: One line that says where the plan comes from.

    Returns:
        The folder to give as `--config-dir`.
    """
    settings = {"name": name, "plan": _set(run.settings["plan"]), "train": _set(run.settings["train"])}
    folder = out / BEST
    for group, content in (
        ("plan", HEADER.format(text=" ".join(text.split()), plan=plan) + _yaml(settings)),
        ("model", _yaml(run.settings["model"])),
        ("data", _yaml(run.settings["data"])),
    ):
        (folder / group).mkdir(parents=True, exist_ok=True)
        replace_file(folder / group / f"{plan}.yaml", content)
    return folder


def _set(tree: Any) -> Any:
    """A tree without the keys that are not set; a phase without any stays."""
    if isinstance(tree, dict):
        return {key: _set(value) for key, value in tree.items() if value is not None and value != []}
    return tree


def _yaml(tree: Any) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
