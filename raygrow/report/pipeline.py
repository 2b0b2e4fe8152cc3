"""Reads the folder of a pipeline: its stages, the run that it trained, what sparsity costs, what the server said."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raygrow.report.runs import Run, load_runs, read_yaml
from raygrow.weights.json_file import read_json

PIPELINE_FILE = "pipeline.yaml"
"""All settings of a pipeline; what tells its folder from others."""
RECORD_FILE = "stage.json"
"""What a stage says about itself."""
STAGES = ("prepare", "train", "evaluate", "sparsify", "serve")
"""In order; the name of each is that of its folder."""
PLAN = "sparsify/model/sparsity.json"


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """One stage, as far as it has come."""

    name: str
    status: str
    """`finished`, `begun` or `to come`."""
    starts: int
    seconds: float | None
    flops: float | None
    gave: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Level:
    """What a sparsity saves and costs; the dense model has neither nominal nor skipped."""

    sparsity: float | None
    nominal: float
    skipped: float
    scores: dict[str, dict[str, Any]]
    """The evaluation by policy, of those that are there."""

    def loss(self, policy: str) -> float | None:
        """Nats per token under a policy."""
        return self.scores[policy]["loss"] if policy in self.scores else None


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A pipeline's folder in memory."""

    name: str
    path: Path
    settings: dict[str, Any]
    stages: list[StageRecord]
    runs: list[Run]
    """What it has trained, the control from scratch last; none before that has begun."""
    plan: dict[str, Any]
    """`sparsity.json`; empty before there is one."""
    levels: list[Level]
    """The dense model first, evaluated or not; then the sparse ones that are."""

    def stage(self, name: str) -> StageRecord:
        """One stage by its name."""
        return next(stage for stage in self.stages if stage.name == name)


def are_pipelines(folders: Sequence[Path]) -> bool:
    """Whether this is the folder of a pipeline.

    Raises:
        ValueError: If one of several is.
    """
    found = [Path(folder) for folder in folders if (Path(folder) / PIPELINE_FILE).is_file()]
    if found and len(folders) > 1:
        raise ValueError(f"{found[0]} is a pipeline, which has a report of its own: name it alone")
    return bool(found)


def load_pipeline(path: Path) -> Pipeline:
    """Reads the folder of a pipeline, finished or not.

    Raises:
        ValueError: If a file in it is damaged; names it.
    """
    path = Path(path).resolve()
    begun = (path / "train/run.yaml").is_file()
    plan = read_json(path / PLAN) if (path / PLAN).is_file() else {}
    return Pipeline(
        name=path.name,
        path=path,
        settings=read_yaml(path / PIPELINE_FILE),
        stages=[_stage(path, name) for name in STAGES],
        runs=load_runs([path / "train"]) if begun else [],
        plan=plan,
        levels=_levels(path, plan),
    )


def _stage(path: Path, name: str) -> StageRecord:
    file = path / name / RECORD_FILE
    record = read_json(file) if file.is_file() else {}
    return StageRecord(
        name=name,
        status="finished" if record.get("finished") else "begun" if record else "to come",
        starts=record.get("starts", 0),
        seconds=record.get("seconds"),
        flops=record.get("flops"),
        gave=record.get("gave", {}),
    )


def _levels(path: Path, plan: dict[str, Any]) -> list[Level]:
    dense = Level(sparsity=None, nominal=0.0, skipped=0.0, scores=_scores(path / "evaluate", "dense"))
    sparse = [
        Level(
            sparsity=float(key),
            nominal=level["nominal"],
            skipped=level["skipped"],
            scores=_scores(path / "sparsify", f"{float(key):g}"),
        )
        for key, level in plan.get("levels", {}).items()
    ]
    return [dense, *(level for level in sparse if level.scores)]


def _scores(folder: Path, level: str) -> dict[str, dict[str, Any]]:
    files = {policy: folder / f"{level}-{policy}.json" for policy in ("decode", "all")}
    return {policy: read_json(file) for policy, file in files.items() if file.is_file()}
