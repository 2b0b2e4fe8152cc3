"""What a search may choose from: a file of `tune_spaces/`, as a config."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

LISTS = ("grid", "choice")
RANGES = {"uniform": 2, "loguniform": 2, "quniform": 3}
"""How many numbers each kind of range takes: its ends, and for quniform the step."""


@dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """What one trial gets. Each trains in a single process."""

    cpus: PositiveFloat = 1
    gpus: Literal["auto"] | NonNegativeFloat = "auto"
    """May be a fraction, so that small trials share a GPU. `auto` is one where the cluster has any, else none."""
    concurrent: PositiveInt | None = None
    """Most trials at a time; as many as there is room for when not given."""
    max_failures: NonNegativeInt = 3
    """How often a trial goes on from its last checkpoint after its process or node was lost."""


@dataclass(frozen=True, kw_only=True)
class AshaConfig:
    """Stopping trials early: asynchronous successive halving (arXiv 1810.05934) on the FLOPs spent.

    Trials are held against those of the same budget and the same seed; where they decay by different schedules, only
    until the first one does.
    """

    grace: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Where the first rung is: this share of a budget after the last growth of any of its trials. A model looks bad
    while it is freshly grown."""
    reduction_factor: Annotated[float, Field(gt=1)] = 2
    """One of this many trials goes on from each rung, and each rung is at this many times the FLOPs."""


@dataclass(frozen=True, kw_only=True)
class SpaceConfig:
    """A file of `tune_spaces/`.

    Raises:
        ValueError: If values are not written as one of the kinds above, or not of a kind that `search` can use.
    """

    search: Literal["grid", "optuna"] = "grid"
    samples: NonNegativeInt = 20
    """Trials that Optuna chooses; 0 leaves the control and the formula's alone."""
    space: dict[str, Any]
    """Dotted key of the run -> `{grid: [...]}`, `{choice: [...]}`, `{uniform: [low, high]}`, `{loguniform: ...}` or
    `{quniform: [low, high, step]}`."""
    control: bool = True
    """Also the final model from scratch on the same FLOPs, for every value of the keys outside of the phases."""
    formula: bool = False
    """Also the published formula's timing, clamped, for every value of the keys outside of the phases."""
    trial: TrialConfig = field(default_factory=TrialConfig)
    asha: AshaConfig | None = field(default_factory=AshaConfig)

    def __post_init__(self) -> None:
        if not self.space:
            raise ValueError("space is empty: name at least one key, such as plan.phases.base.share: {grid: [0.05]}")
        for key, values in self.space.items():
            if problem := _problem(values, self.search):
                raise ValueError(f"space.{key}={values!r}: {problem}")


def _problem(values: Any, search: str) -> str | None:
    """What is wrong with the values of one key."""
    one = isinstance(values, Mapping) and len(values) == 1
    kind, numbers = next(iter(values.items())) if one else (None, None)
    if kind not in (*LISTS, *RANGES) or not isinstance(numbers, list):
        return f"must be exactly one of {', '.join((*LISTS, *RANGES))} with a list, such as {{grid: [1, 2]}}"
    if kind in LISTS:
        return None if numbers else "the list is empty"
    if search == "grid":
        return "a grid needs lists of values; for a range, set search: optuna"
    if len(numbers) != RANGES[kind] or not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
        return f"{kind} takes {RANGES[kind]} numbers"
    low, high = numbers[:2]
    if low >= high or (kind == "loguniform" and low <= 0) or (kind == "quniform" and numbers[2] <= 0):
        return f"{kind} takes a lower and a higher number" + (", above 0" if kind == "loguniform" else "")
    return None
