"""Means over seeds, with how sure they are."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from raygrow.report import units

STUDENT_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t for a two-sided 95 % interval, by degrees of freedom from 1; the last one is used beyond, a bit wide."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval, `mean - half` to `mean + half`; no interval from one seed."""

    mean: float
    half: float | None
    seeds: int


def estimate(values: Iterable[float]) -> Estimate | None:
    """Mean and 95 % t-interval; None of no values, no interval of one."""
    found = np.array(list(values), dtype=float)
    if not len(found):
        return None
    freedom = len(found) - 1
    if not freedom:
        return Estimate(float(found[0]), None, 1)
    t = STUDENT_95[min(freedom, len(STUDENT_95)) - 1]
    return Estimate(float(found.mean()), t * float(found.std(ddof=1)) / math.sqrt(len(found)), len(found))


def interval(value: Estimate | None, *, signed: bool = False) -> str:
    """A mean and the half of its interval: `1.234 ± 0.005`."""
    if value is None:
        return units.DASH
    mean = f"{value.mean:{'+' if signed else ''}.3f}"
    return mean if value.half is None else f"{mean} ± {value.half:.3f}"


def percents(value: Estimate | None) -> str:
    """The same of a share, in percent."""
    if value is None:
        return units.DASH
    mean = units.percent(value.mean, signed=True)
    return mean if value.half is None else f"{mean} ± {units.percent(value.half)}"
