"""The rule table: how each tensor of one model is made from the tensors of another.

A `Rule` is a sum of terms, then an optional fill; a term is a coefficient times a source tensor with its axes
re-indexed, a fill puts something else into the result, such as random numbers (`weights/fills.py`). `Stacked` puts the
results of several rules along a new first axis, as the experts of a mixture are stored. Rules are data, so one table
serves full tensors, tensors read lazily from a file, shards' full sources, meta tensors (shapes only) and, through
`weights/moments.py`, Adam's moments.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

Gather = tuple[tuple[int, ...] | int | None, ...]
"""For each axis the source indices to take, in order and with repeats; an integer takes that one and drops the axis;
None takes the axis as it is."""


@dataclass(frozen=True)
class Term:
    """`coefficient * source[gather]`."""

    source: str
    coefficient: float = 1.0
    gather: Gather | None = None
    gradient: float = 1.0
    """The gradient of an element of the target, as a multiple of that of the source's element behind it. Adam's m
    follows it, v its square."""

    def apply(self, sources: Mapping[str, Tensor]) -> Tensor:
        """The term's value; the source tensor itself, not a copy, where nothing changes.

        Raises:
            ValueError: If the source tensor is missing.
        """
        gather = self.gather or ()
        if gather and isinstance(gather[0], int):
            value, gather = take(sources, self.source, gather[0]), gather[1:]
        else:
            value = _get(sources, self.source)
        axis = 0
        for indices in gather:
            if isinstance(indices, int):
                value = value.select(axis, indices)
                continue
            if indices is not None:
                value = value.index_select(axis, torch.tensor(indices, device=value.device))
            axis += 1
        return value if self.coefficient == 1.0 else value * self.coefficient

    def at(self, index: int) -> "Term":
        """The term whose value is this one's at `index` of its first axis."""
        gather = (*(self.gather or ()), None)
        axis = next(axis for axis, indices in enumerate(gather) if not isinstance(indices, int))
        indices = gather[axis]
        taken = indices[index] if isinstance(indices, tuple) else index
        return replace(self, gather=(*gather[:axis], taken, *gather[axis + 1 :]))


class Fill(Protocol):
    """What is put into the sum of the terms: a pure function of the fill's own settings and of that sum."""

    def apply(self, value: Tensor | None, sources: Mapping[str, Tensor]) -> Tensor:
        """The filled tensor; the one given stays as it is. `value` is None where a rule has no terms."""
        ...


@dataclass(frozen=True)
class Rule:
    """One target tensor as the sum of its terms, then filled. A rule has at least one of the two."""

    terms: tuple[Term, ...] = ()
    fill: Fill | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the source tensors, in the order of the terms."""
        return tuple(term.source for term in self.terms)

    def apply(self, sources: Mapping[str, Tensor]) -> Tensor:
        """The target tensor, on the device of its sources. A plain copy returns the source tensor itself."""
        value = None
        for term in self.terms:
            part = term.apply(sources)
            value = part if value is None else value + part
        if self.fill is not None:
            value = self.fill.apply(value, sources)
        assert value is not None, "a rule has terms or a fill"
        return value


@dataclass(frozen=True)
class Stacked:
    """One target tensor as the results of several rules along a new first axis."""

    rules: tuple[Rule, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the source tensors of all rules, in their order."""
        return tuple(source for rule in self.rules for source in rule.sources)

    def apply(self, sources: Mapping[str, Tensor]) -> Tensor:
        """The target tensor."""
        first, *rest = (rule.apply(sources) for rule in self.rules)
        return torch.stack([first, *rest])


Rules = Mapping[str, Rule | Stacked]
"""For every tensor of the target, by name, the rule that makes it. The order is the order of the target."""


def copy_rule(name: str) -> Rule:
    """The rule that takes the source tensor `name` as it is."""
    return Rule((Term(name),))


def take(sources: Mapping[str, Tensor], name: str, index: int) -> Tensor:
    """`sources[name][index]`, without making the rest where the mapping knows how to."""
    if isinstance(sources, Sliceable):
        return sources.take(name, index)
    return _get(sources, name)[index]


class Sliceable(Mapping[str, Tensor]):
    """A mapping that can make one slice along a tensor's first axis without the others."""

    @abstractmethod
    def take(self, name: str, index: int) -> Tensor:
        """The slice."""
        ...


def _get(sources: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in sources:
        raise ValueError(f"tensor {name!r} is missing from the source model")
    return sources[name]
