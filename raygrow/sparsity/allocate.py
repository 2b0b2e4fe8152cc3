"""How a sparsity is split between the inputs of all Blocks.

Every split of a level skips the same number of weights. What comes from the residual stream (`attention`, `mlp`) and
what does not (`o`, `down`) bear different sparsities, and so do early and late Blocks. The search is measured on the
calibration text, all tokens sparse, as the divergence of the model's predictions from the dense one's:

1. one share for the residual stream's inputs, another for the others: the best of a grid of their ratios;
2. from what each input costs when it alone is sparse, at a few sparsities: weights are dropped where the next ones cost
   least, as long as costs add up. It is taken if it measures better than the first.

Shares are the parts of an input's entries that are dropped.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from raygrow.nn.config import ModelConfig
from raygrow.progress import Progress, silent
from raygrow.sparsity.inputs import ROTATED, Place, block_weights, input_weights, places

Split = Mapping[Place, float]
SplitName = Literal["uniform", "ratio", "search"]

LARGEST_SHARE = 0.95
RATIOS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
"""Shares of the residual stream's inputs, as multiples of a uniform split's."""
PROBES = (0.3, 0.5, 0.7, 0.85)
STEP = 0.01


def uniform(config: ModelConfig, sparsity: float) -> dict[Place, float]:
    """The same share everywhere.

    Raises:
        ValueError: If not enough weights can be dropped.
    """
    return ratio_split(config, sparsity, 1.0)


def ratio_split(config: ModelConfig, sparsity: float, ratio: float) -> dict[Place, float]:
    """One share for the residual stream's inputs, `ratio` times that of a uniform split, and another for the rest.

    Raises:
        ValueError: If not enough weights can be dropped.
    """
    weights = {place: input_weights(config, *place) for place in places(config)}
    rotated = sum(weight for (_, name), weight in weights.items() if name in ROTATED)
    others = sum(weights.values()) - rotated
    budget = sparsity * block_weights(config)
    share = min(ratio * budget / (rotated + others), LARGEST_SHARE)
    other = (budget - share * rotated) / others
    if not 0 <= other <= LARGEST_SHARE:
        # what one side cannot give, the other has to
        other = min(max(other, 0.0), LARGEST_SHARE)
        share = (budget - other * others) / rotated
    if share > LARGEST_SHARE + 1e-9:
        raise ValueError(f"sparsity={sparsity:g}: more than can be dropped of this model's inputs")
    return {place: share if place[1] in ROTATED else other for place in weights}


def best_ratio(
    config: ModelConfig, sparsity: float, cost: Callable[[Split], float]
) -> tuple[dict[Place, float], float]:
    """The split of the best of all RATIOS, and its cost."""
    tried = [ratio_split(config, sparsity, ratio) for ratio in RATIOS]
    different = [split for index, split in enumerate(tried) if split not in tried[:index]]
    costs = [cost(split) for split in different]
    best = min(range(len(costs)), key=costs.__getitem__)
    return different[best], costs[best]


def probe(
    config: ModelConfig, cost: Callable[[Split], float], *, progress: Progress = silent
) -> dict[Place, list[float]]:
    """What it costs when one input alone is sparse: at each of PROBES, for every input."""
    found: dict[Place, list[float]] = {}
    every = list(places(config))
    for done, place in enumerate(every, start=1):
        found[place] = [cost({place: share}) for share in PROBES]
        progress(done, len(every), "inputs probed")
    return found


def cheapest(config: ModelConfig, sparsity: float, costs: Mapping[Place, Sequence[float]]) -> dict[Place, float]:
    """The split that costs least, if costs of inputs add up.

    Args:
        config: The model.
        sparsity: Share of the Blocks' weights to drop.
        costs: From `probe`.
    """
    weights = {place: input_weights(config, *place) for place in costs}
    curves = {place: _convex([0.0, *PROBES], [0.0, *found]) for place, found in costs.items()}
    left = sparsity * block_weights(config)
    split = dict.fromkeys(costs, 0.0)

    def price(place: Place) -> float:
        share = split[place]
        return (_at(curves[place], share + STEP) - _at(curves[place], share)) / (STEP * weights[place])

    queue = [(price(place), place) for place in costs]
    heapq.heapify(queue)
    while left > 0 and queue:
        _, place = heapq.heappop(queue)
        step = min(STEP, left / weights[place], LARGEST_SHARE - split[place])
        split[place] += step
        left -= step * weights[place]
        if split[place] < LARGEST_SHARE - 1e-9:
            heapq.heappush(queue, (price(place), place))
    return split


Curve = tuple[Sequence[float], Sequence[float]]


def _convex(x: Sequence[float], y: Sequence[float]) -> Curve:
    """The largest convex curve below the points: noise must not make a later step look cheaper than the one before."""
    hull: list[tuple[float, float]] = []
    for point in zip(x, y, strict=True):
        while len(hull) > 1 and _slope(hull[-2], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return [point[0] for point in hull], [point[1] for point in hull]


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _at(curve: Curve, share: float) -> float:
    """The curve's value; beyond its last point it goes on ever more steeply."""
    x, y = curve
    for i in range(1, len(x)):
        if share <= x[i]:
            return y[i - 1] + (share - x[i - 1]) * _slope((x[i - 1], y[i - 1]), (x[i], y[i]))
    over = (share - x[-1]) / (1.0 - x[-1])
    last = max(_slope((x[-2], y[-2]), (x[-1], y[-1])), 0.0)
    return y[-1] + (share - x[-1]) * last * (1 + 3 * over)
