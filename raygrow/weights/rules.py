"""The rule table: how each tensor of one model is made from the tensors of another.

A `Rule` is a sum of terms; a term is a coefficient times a source tensor with its axes re-indexed. Rules are data, so
one table serves full tensors, tensors read lazily from a file, shards' full sources and meta tensors (shapes only).
Adam's moments m and v follow the same rules as the parameter they belong to; the step count is copied.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Gather = tuple[tuple[int, ...] | None, ...]
"""For each axis the source indices to take, in order and with repeats; None takes the axis as it is."""


@dataclass(frozen=True)
class Term:
    """`coefficient * source[gather]`."""

    source: str
    coefficient: float = 1.0
    gather: Gather | None = None

    def apply(self, sources: Mapping[str, Tensor]) -> Tensor:
        """The term's value; the source tensor itself, not a copy, where nothing changes.

        Raises:
            ValueError: If the source tensor is missing.
        """
        if self.source not in sources:
            raise ValueError(f"tensor {self.source!r} is missing from the source model")
        value = sources[self.source]
        for axis, indices in enumerate(self.gather or ()):
            if indices is not None:
                value = value.index_select(axis, torch.tensor(indices, device=value.device))
        return value if self.coefficient == 1.0 else value * self.coefficient


@dataclass(frozen=True)
class Rule:
    """One target tensor as the sum of its terms."""

    terms: tuple[Term, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the source tensors, in the order of the terms."""
        return tuple(term.source for term in self.terms)

    def apply(self, sources: Mapping[str, Tensor]) -> Tensor:
        """The target tensor, on the device of its sources. A plain copy returns the source tensor itself."""
        first, *rest = self.terms
        value = first.apply(sources)
        for term in rest:
            value = value + term.apply(sources)
        return value


Rules = Mapping[str, Rule]
"""For every tensor of the target, by name, the rule that makes it. The order is the order of the target."""


def copy_rule(name: str) -> Rule:
    """The rule that takes the source tensor `name` as it is."""
    return Rule((Term(name),))
