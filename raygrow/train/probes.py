"""Symmetry breaking: how far the copies that growth made of heads and experts have come apart in training.

Equal copies get equal gradients and would stay together for good, a wide model that learns no more than a narrow one.
A divergence is the distance of copies from their mean, relative to their size: 0 where they are identical, about 1
where they have nothing in common.

Shapes: C copies, R rows, D model.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from raygrow.nn.rack import Rack
from raygrow.train.plan import Phase

TOGETHER = 1e-6
"""Copies no farther apart than this have not parted: the figure is rounding."""

PATIENCE = 20
"""Steps after which they should have."""

CURES = {
    "head_divergence": "heads: set its growth's noise_snr_db (10 is common)",
    "expert_divergence": "experts: set its growth's router_std above 0, or drop",
}


@torch.no_grad()
def divergences(model: Rack, phase: Phase) -> dict[str, float]:
    """Mean divergence over Blocks of what the phase's growth copied, by metric name. Every worker has to call it."""
    if phase.growth is None or phase.source is None:
        return {}
    found = {}
    heads, columns = phase.model.n_heads // phase.source.n_heads, phase.model.d_model // phase.source.d_model
    if heads > 1:
        found["head_divergence"] = _mean(_divergence(copies) for copies in _head_copies(model, heads, columns))
    if phase.model.n_experts > 1 and not phase.source.n_experts:
        found["expert_divergence"] = _mean(_divergence(copies) for copies in _whole(model, ".experts.up.weight"))
    return found


def still_together(phase: Phase, figures: Mapping[str, float]) -> str | None:
    """What to tell at the end of a phase whose copies have not parted, if so."""
    cures = [cure for name, cure in CURES.items() if figures.get(name, math.inf) < TOGETHER]
    if phase.steps < PATIENCE or not cures:
        return None
    return (
        f"{phase.name}: after {phase.steps} steps the copies that growth made are still the same, and learn as one. "
        f"For {'; for '.join(cures)}. For both: optimizer_state=asymmetric"
    )


def _head_copies(model: Rack, heads: int, columns: int) -> Iterator[Tensor]:
    """Every Block's query weights as `(C, R, D)`, one matrix for each copy of the heads.

    The copies of columns are summed, since their inputs start as copies too: that is what a head does to the narrow
    model's stream, and noise that cancels in it does not count.
    """
    for weight_RD in _whole(model, ".attention.q.weight"):
        yield weight_RD.unflatten(1, (columns, -1)).sum(1).unflatten(0, (heads, -1))


def _divergence(copies_CRD: Tensor) -> float:
    copies = len(copies_CRD)
    apart = torch.linalg.vector_norm(copies_CRD - copies_CRD.mean(0)) / torch.linalg.vector_norm(copies_CRD)
    # of C unrelated ones each is a 1/C part of their mean
    return apart.item() * math.sqrt(copies / (copies - 1))


def _mean(values: Iterator[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _whole(model: Rack, suffix: str) -> Iterator[Tensor]:
    """The parameters whose names end so, in the order of Blocks, each gathered from all workers when its turn comes."""
    for name, parameter in model.named_parameters():
        if name.endswith(suffix):
            yield parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
