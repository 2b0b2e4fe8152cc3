"""The constants of the timing formula, fitted to one's own best timings."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raygrow.growth.timing import PUBLISHED, formula


@dataclass(frozen=True, kw_only=True)
class TimingPoint:
    """The best timing found for one target and budget."""

    params: float
    """N, non-embedding parameters of the target."""
    flops: float
    """C = 6 x N x tokens that the budget would train the target on."""
    base_tokens: float
    """d, tokens of the base before growth."""


@dataclass(frozen=True, kw_only=True)
class TimingFit:
    """The formula's constants after a fit; those that the points do not determine are the published ones."""

    constants: dict[str, float]
    """`a`, `b` and `c`."""
    errors: dict[str, float]
    """Standard errors of the fitted ones; empty where there are no more points than those."""
    points: int
    rank: int
    """Of the points' equations for a, b and c: 3 where they have one solution."""
    condition: float
    """Of the two slopes' columns, centred and scaled: how much a and b stand in for each other. 1 is not at all,
    infinite where one of N and C does not vary."""
    largest_error: float
    """How far the worst point is from the fit: a factor on d."""
    fitted: tuple[str, ...]
    """Names of the constants that the points determine."""

    def base_tokens(self, params: float, flops: float) -> float:
        """Tokens of the base by these constants."""
        return formula(params, flops, self.constants)


LARGEST_CONDITION = 30.0
"""Slopes further entangled than this are not told apart by points that each have some noise."""


def fit_timing(points: Sequence[TimingPoint]) -> TimingFit:
    """Least squares of log10(d) = a log10(N) + b / log10(C) + c.

    Points of one N leave a as published, those of one C leave b, and where N and C change together so that their
    effects cannot be told apart, both stay: then only c is fitted.

    Raises:
        ValueError: If there are no points.
    """
    if not points:
        raise ValueError("the formula cannot be fitted to no points: at least one best timing is needed")
    columns = {
        "a": np.array([math.log10(point.params) for point in points]),
        "b": np.array([1 / math.log10(point.flops) for point in points]),
        "c": np.ones(len(points)),
    }
    target = np.array([math.log10(point.base_tokens) for point in points])
    varying = [name for name in ("a", "b") if np.ptp(columns[name]) > 1e-9 * np.abs(columns[name]).max()]
    condition = _condition([columns[name] for name in varying]) if len(varying) == 2 else math.inf
    slopes = [] if len(varying) == 2 and condition > LARGEST_CONDITION else varying
    fitted = (*slopes, "c")
    rest = target - sum(PUBLISHED[name] * columns[name] for name in columns if name not in fitted)
    matrix = np.stack([columns[name] for name in fitted], axis=1)
    solution, *_ = np.linalg.lstsq(matrix, rest)
    misses = rest - matrix @ solution
    freedom = len(points) - len(fitted)
    errors = {}
    if freedom > 0:
        covariance = np.linalg.inv(matrix.T @ matrix) * float(misses @ misses) / freedom
        errors = {name: float(error) for name, error in zip(fitted, np.sqrt(np.diag(covariance)), strict=True)}
    return TimingFit(
        constants=PUBLISHED | {name: float(value) for name, value in zip(fitted, solution, strict=True)},
        errors=errors,
        points=len(points),
        rank=1 + (min(len(varying), 1) if condition > 1e6 else 2),
        condition=condition,
        largest_error=10 ** float(np.abs(misses).max()),
        fitted=fitted,
    )


def _condition(columns: list[np.ndarray]) -> float:
    """Condition number of columns after each is centred and scaled; infinite where they are copies of each other."""
    scaled = [(column - column.mean()) / column.std() for column in columns]
    values = np.linalg.svd(np.stack(scaled, axis=1), compute_uv=False)
    return float(values[0] / values[-1]) if len(values) == len(columns) and values[-1] > 1e-9 * values[0] else math.inf
