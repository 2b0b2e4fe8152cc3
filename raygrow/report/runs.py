"""Reads run folders: what was set, what was measured, how growth was verified, how the run ended.

A run in progress has no summary yet, perhaps no history, and may be in the middle of writing a line: all fine.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from raygrow.weights.json_file import read_json

SCRATCH_SUFFIX = "-scratch"
"""The control of a run `name` is the run `name-scratch` beside it."""


@dataclass(frozen=True, kw_only=True)
class PhaseRecord:
    """One phase of a run, as far as it has come. Costs are the run's totals at the phase's start and end."""

    name: str
    n_blocks: int | None
    parameters: int | None
    active_parameters: int | None
    """Those that one token goes through, where a run says so."""
    steps: int
    tokens: float
    """Tokens of this phase alone."""
    start_flops: float
    end_flops: float
    start_seconds: float
    end_seconds: float
    newest: dict[str, Any]
    """The newest value of every metric, by name."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder in memory."""

    name: str
    """What the report calls it; no two runs in it have the same."""
    path: Path
    settings: dict[str, Any]
    """`run.yaml`: the resolved config with commit and versions."""
    history: list[dict[str, Any]]
    """Lines of `history.jsonl`, in order."""
    growths: dict[str, dict[str, Any]]
    """Verification of each growth, by the phase that it starts."""
    summary: dict[str, Any]
    """Empty while the run goes on."""

    @property
    def status(self) -> str:
        """`finished`, `failed`, `stopped` or `in progress`."""
        return self.summary.get("status", "in progress")

    @property
    def is_grown(self) -> bool:
        """Whether growth is part of the run, be it still to come."""
        plan = self.settings.get("plan") or {}
        phases = (plan.get("phases") or {}).values()
        return bool(self.growths) or any(phase and phase.get("growth") for phase in phases)

    @property
    def phases(self) -> list[PhaseRecord]:
        """Phases that have reported, in order."""
        names = list(dict.fromkeys(line["phase"] for line in self.history))
        described = {phase["name"]: phase for phase in self.summary.get("phases", [])}
        found, before = [], {"flops": 0.0, "tokens": 0.0, "seconds": 0.0}
        for name in names:
            lines = [line for line in self.history if line["phase"] == name]
            last, told = lines[-1], described.get(name, {})
            phase = PhaseRecord(
                name=name,
                n_blocks=told.get("n_blocks"),
                parameters=told.get("parameters") or self.growths.get(name, {}).get("parameters"),
                active_parameters=told.get("active_parameters"),
                steps=last["step"],
                tokens=last["tokens"] - before["tokens"],
                start_flops=before["flops"],
                end_flops=last["flops"],
                start_seconds=before["seconds"],
                end_seconds=last["seconds"],
                newest={key: value for line in lines for key, value in line.items() if value is not None},
            )
            found.append(phase)
            before = last
        return found

    def columns(self, *keys: str) -> tuple[np.ndarray, ...]:
        """The named metrics over the history, from the lines where all of them are there and finite."""
        lines = ([line.get(key) for key in keys] for line in self.history)
        rows = np.array([row for row in lines if None not in row], dtype=float).reshape(-1, len(keys))
        return tuple(rows[np.isfinite(rows).all(axis=1)].T)

    def last(self, key: str) -> float | None:
        """The newest value of a metric, or None where there is none yet."""
        return next((line[key] for line in reversed(self.history) if line.get(key) is not None), None)


def load_run(path: Path) -> Run:
    """Reads a run folder.

    Raises:
        FileNotFoundError: If the folder holds neither `run.yaml` nor `history.jsonl`.
        ValueError: If a file in it is damaged; names the file, and the line in a history.
    """
    path = Path(path)
    history, settings, summary = path / "history.jsonl", path / "run.yaml", path / "summary.json"
    if not history.is_file() and not settings.is_file():
        raise FileNotFoundError(f"{path} is no run folder: it holds neither run.yaml nor history.jsonl")
    set_to = read_yaml(settings) if settings.is_file() else {}
    place = {name: index for index, name in enumerate((set_to.get("plan") or {}).get("phases") or {})}
    growths = sorted((path / "growth").glob("*.json"), key=lambda file: place.get(file.stem, len(place)))
    return Run(
        name=path.resolve().name,
        path=path.resolve(),
        settings=set_to,
        history=read_history(history) if history.is_file() else [],
        growths={file.stem: read_json(file) for file in growths},
        summary=read_json(summary) if summary.is_file() else {},
    )


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Reads run folders, grown ones first, and adds the control of each where it lies beside it and is not named.

    Runs are called by the names of their folders, and by more of their paths where two have the same.
    """
    paths = [Path(path).resolve() for path in paths]
    controls = [path.with_name(path.name + SCRATCH_SUFFIX) for path in paths]
    found = [control for control in controls if (control / "run.yaml").is_file()]
    runs = sorted((load_run(path) for path in dict.fromkeys(paths + found)), key=lambda run: not run.is_grown)
    if len({run.name for run in runs}) < len(runs):
        common = os.path.commonpath([run.path.parent for run in runs])
        runs = [replace(run, name=str(run.path.relative_to(common))) for run in runs]
    return runs


def read_history(file: Path) -> list[dict[str, Any]]:
    """Lines of a `history.jsonl`. A last line without its newline is still being written and is left out if broken.

    Raises:
        ValueError: If a line is damaged; names it as `file:line`.
    """
    lines = []
    for number, text in enumerate(file.read_bytes().splitlines(keepends=True), 1):
        try:
            line = json.loads(text)
            missing = {"phase", "step", "tokens", "flops", "seconds"} - line.keys()
        except (ValueError, AttributeError) as error:  # bytes that are no text are a ValueError too
            if not text.endswith(b"\n"):
                break
            raise ValueError(f"{file}:{number} is damaged: {error}. Remove the line and try again.") from error
        if missing:
            raise ValueError(f"{file}:{number} is no line of a history: it lacks {', '.join(sorted(missing))}")
        lines.append(line)
    return lines


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        ValueError: If it is damaged; names it.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__} where a mapping of keys and values has to be")
    return content
