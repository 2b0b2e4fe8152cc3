"""Did growth pay? Compares a grown run with one from scratch on their validation curves.

FLOPs count every phase, the small base model included. Speedup is that of Gstack (arXiv 2405.15319, appendix B.2):
FLOPs_scratch / FLOPs_grown - 1 at equal loss, here on validation loss and not on a smoothed training curve.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from raygrow.report import units
from raygrow.report.runs import Run

TIE = 0.01
"""Nats. A smaller difference is called none: another seed moves the loss of small runs as much."""

EQUAL_BUDGET = 0.02
"""Budgets that differ by no more than this share count as equal."""


@dataclass(frozen=True)
class Curve:
    """Validation loss, in nats per token, against a cost (FLOPs or seconds) that never falls."""

    cost: np.ndarray
    loss: np.ndarray

    @property
    def end(self) -> float:
        """Cost of the last evaluation."""
        return float(self.cost[-1])

    @property
    def lowest(self) -> float:
        return float(self.loss.min())

    def at(self, cost: float) -> float:
        """Loss at a cost, interpolated linearly."""
        return float(np.interp(cost, self.cost, self.loss))

    def reach(self, loss: float) -> float | None:
        """Cost at which the best loss so far came down to `loss`, interpolated linearly; None if it never did.

        Best so far, because evaluations are noisy and growth may raise the loss for a while.
        """
        best = np.minimum.accumulate(self.loss)
        reached = np.flatnonzero(best <= loss)
        if not len(reached):
            return None
        i = reached[0]
        if i == 0:
            return float(self.cost[0])
        share = (best[i - 1] - loss) / (best[i - 1] - best[i])
        return float(self.cost[i - 1] + share * (self.cost[i] - self.cost[i - 1]))


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """What each run paid to reach one loss; None where it never did."""

    loss: float
    grown: float | None
    scratch: float | None

    @property
    def speedup(self) -> float | None:
        """Cost from scratch / cost grown - 1; negative where growth was slower."""
        return self.scratch / self.grown - 1 if self.grown and self.scratch else None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A grown run against one from scratch."""

    grown: str
    scratch: str
    flops: float
    """The cost up to which both runs have been evaluated: where their losses are compared."""
    grown_loss: float
    scratch_loss: float
    equal_budgets: bool
    finished: bool
    reached: Crossing
    """At the higher of the two lowest losses: both runs came down to it."""
    reached_seconds: Crossing
    """The same loss, in seconds of training."""
    beyond: Crossing
    """At the lower of the two lowest losses: as a rule one run never got there."""

    @property
    def gain(self) -> float:
        """Nats by which the grown run is better at equal FLOPs."""
        return self.scratch_loss - self.grown_loss

    @property
    def outcome(self) -> Literal["won", "lost", "tied"]:
        if abs(self.gain) < TIE:
            return "tied"
        return "won" if self.gain > 0 else "lost"


def validation_curve(run: Run, cost: str) -> Curve | None:
    """The run's validation loss against `flops` or `seconds`; None before its first evaluation."""
    costs, losses = run.columns(cost, "val_loss")
    return Curve(costs, losses) if len(costs) else None


def crossing(grown: Curve, scratch: Curve, loss: float) -> Crossing:
    """What each curve paid to reach `loss`."""
    return Crossing(loss=loss, grown=grown.reach(loss), scratch=scratch.reach(loss))


def compare(grown: Run, scratch: Run) -> Comparison | None:
    """Compares two runs; None while one of them has not been evaluated."""
    curves = [validation_curve(run, cost) for cost in ("flops", "seconds") for run in (grown, scratch)]
    if any(curve is None for curve in curves):
        return None
    grown_flops, scratch_flops, grown_seconds, scratch_seconds = (curve for curve in curves if curve is not None)
    flops = min(grown_flops.end, scratch_flops.end)
    higher = max(grown_flops.lowest, scratch_flops.lowest)
    lower = min(grown_flops.lowest, scratch_flops.lowest)
    return Comparison(
        grown=grown.name,
        scratch=scratch.name,
        flops=flops,
        grown_loss=grown_flops.at(flops),
        scratch_loss=scratch_flops.at(flops),
        equal_budgets=flops >= (1 - EQUAL_BUDGET) * max(grown_flops.end, scratch_flops.end),
        finished=grown.status == scratch.status == "finished",
        reached=crossing(grown_flops, scratch_flops, higher),
        reached_seconds=crossing(grown_seconds, scratch_seconds, higher),
        beyond=crossing(grown_flops, scratch_flops, lower),
    )


def compare_runs(runs: list[Run]) -> list[Comparison]:
    """Every grown run against every run from scratch."""
    pairs = ((grown, scratch) for grown in runs if grown.is_grown for scratch in runs if not scratch.is_grown)
    found = (compare(*pair) for pair in pairs)
    return [comparison for comparison in found if comparison is not None]


def fair(comparisons: list[Comparison]) -> list[Comparison]:
    """Those at equal budgets, or all where there are none: at unequal ones only one run's learning rate has decayed."""
    return [c for c in comparisons if c.equal_budgets] or comparisons


def headline(comparisons: list[Comparison]) -> str:
    """The verdict in a few words. Of several grown runs it counts the winners: the best of many wins easily."""
    if len(comparisons) > 1:
        won = sum(c.outcome == "won" for c in comparisons)
        return f"Growth won {won} of {len(comparisons)} comparisons"
    (c,) = comparisons
    if c.finished:
        return {"won": "Growth won", "lost": "Growth lost", "tied": "No clear difference"}[c.outcome]
    return {"won": "Growth is ahead so far", "lost": "Growth is behind so far", "tied": "No clear difference so far"}[
        c.outcome
    ]


def sentences(c: Comparison) -> list[str]:
    """What the two curves allow to say, in whole sentences."""
    side = "lower" if c.gain > 0 else "higher"
    said = [
        f"At equal compute ({units.flops(c.flops)} FLOPs, the base model's included) the validation loss is "
        f"{c.grown_loss:.3f} grown and {c.scratch_loss:.3f} from scratch: {abs(c.gain):.3f} nats per token {side} "
        "with growth."
    ]
    if c.reached.speedup is not None:
        in_time = f" ({units.percent(c.reached_seconds.speedup, signed=True)} in training time)"
        said.append(
            f"Loss {c.reached.loss:.3f}, which both reached, took {units.flops(c.reached.grown)} FLOPs grown and "
            f"{units.flops(c.reached.scratch)} from scratch: a speedup of "
            f"{units.percent(c.reached.speedup, signed=True)}{in_time}."
        )
    late = "from scratch" if c.beyond.scratch is None else "with growth" if c.beyond.grown is None else None
    if late:
        said.append(f"Loss {c.beyond.loss:.3f} was never reached {late}.")
    if not c.equal_budgets:
        said.append("The budgets differ: where they are compared, the longer run had yet to decay its learning rate.")
    return said
