"""What growth saves in a search: gain at equal FLOPs and speedup at equal loss, seed by seed."""

from collections.abc import Callable, Sequence

import numpy as np

from raygrow.report.compare import Comparison, Crossing, Curve, compare, crossing
from raygrow.report.estimate import Estimate, estimate
from raygrow.report.search import Contest, Setting, Trial


def comparisons(setting: Setting, control: Setting) -> list[Comparison]:
    """The setting against the control, seed by seed."""
    pairs = [(trial.run, control.finished.get(seed)) for seed, trial in setting.finished.items()]
    found = (compare(run, other.run) for run, other in pairs if run and other and other.run)
    return [comparison for comparison in found if comparison is not None]


def gain(setting: Setting, control: Setting) -> Estimate | None:
    """Nats by which the setting ends below the control, over the seeds that both have."""
    pairs = ((trial.val_loss, control.finished.get(seed)) for seed, trial in setting.finished.items())
    return estimate(
        other.val_loss - loss for loss, other in pairs if other and other.val_loss is not None and loss is not None
    )


def speedup(setting: Setting, control: Setting, *, of: Callable[[Comparison], Crossing]) -> Estimate | None:
    """Speedup at equal loss over the seeds where both runs reached the loss that `of` a comparison takes."""
    found = (of(comparison).speedup for comparison in comparisons(setting, control))
    return estimate(value for value in found if value is not None)


def decayed_speedup(contests: Sequence[Contest]) -> Estimate | None:
    """Speedup between runs that are each at the end of their own budget, learning rate decayed.

    Takes the best setting and the control of every budget, each where there is one; needs two budgets of both. Straight
    lines between budgets lie above a loss curve's bend: the arm that comes lower seems to need more than it does. That
    makes the speedup rather smaller where it is the grown one, and rather larger where it is the control. An arm
    that is lower with its smallest budget already counts with all of that: budgets must enclose what they are compared
    by.
    """
    arms = [[c.best for c in contests if c.best], [c.control for c in contests if c.control]]
    if min(map(len, arms)) < 2:
        return None
    seeds = set.intersection(*(set(setting.finished) for arm in arms for setting in arm))
    speedups = []
    for seed in sorted(seeds, key=str):
        grown, scratch = (_ends([setting.finished[seed] for setting in arm]) for arm in arms)
        speedups.append(crossing(grown, scratch, max(grown.lowest, scratch.lowest)).speedup)
    return estimate(value for value in speedups if value is not None)


def _ends(trials: Sequence[Trial]) -> Curve:
    """Final loss against budget."""
    return Curve(np.array([t.flops for t in trials]), np.array([t.val_loss for t in trials], dtype=float))
