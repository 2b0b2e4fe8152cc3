"""How Adam's moments follow a growth: from the table of the weights, a table of the same kind for each moment.

A gradient that becomes g times what it was makes m g times and v g^2 times what they were (`Term.gradient`). Targets
whose gradient the source says nothing about are left out: Adam starts afresh there, with m, v and the step count at
zero. The step count of every other target is that of its first source: moments under another step count would be over-
or undercorrected in the first updates.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from raygrow.weights.rules import Gather, Rule, Rules, Stacked

_IN_BLOCK = re.compile(r"^blocks\.\d+\.")

Moment = Literal["exp_avg", "exp_avg_sq"]
"""Adam's m and v, under the names torch gives them."""

Policy = Literal["copy", "asymmetric"]
"""`copy`: every copy goes on with the moments of what it copies. `asymmetric`: only the first copy does (after
SPARKLING, arXiv 2602.02472), so that equal copies part: their weights are equal, their momentum is not."""


def moment_rules(rules: Rules, moment: Moment, policy: Policy) -> Rules:
    """The rules that make one of Adam's moments from the source's.

    Under the asymmetric policy a whole tensor that is a later copy, as in a repeated Block, is left out. Inside a
    tensor that holds copies, as width and experts make, m is zero but for the first copy along every axis; v is scaled
    everywhere, because v = 0 under an old step count would make the first updates far too large.

    Args:
        rules: The table of the weights.
        moment: Which of the two.
        policy: What becomes of copies.
    """
    known = {name: rule for name, rule in rules.items() if any(t.gradient for part in _parts(rule) for t in part.terms)}
    if policy == "asymmetric":
        known = _first_copies(known)
    masked = policy == "asymmetric" and moment == "exp_avg"
    return {name: _moment(rule, moment, masked=masked) for name, rule in known.items()}


@dataclass(frozen=True)
class FirstCopy:
    """Keeps the elements whose index comes up for the first time along every gathered axis; the others become zero."""

    gather: Gather

    def apply(self, value: Tensor | None, sources: Mapping[str, Tensor]) -> Tensor:
        assert value is not None, "a mask needs something to lie on"
        axes = [indices for indices in self.gather if not isinstance(indices, int)]
        for axis, indices in enumerate(axes):
            if indices is not None:
                first = dict(zip(reversed(indices), reversed(range(len(indices))), strict=True))
                mask = torch.zeros(len(indices), dtype=value.dtype, device=value.device)
                mask[list(first.values())] = 1
                value = value * mask.reshape([-1 if a == axis else 1 for a in range(value.ndim)])
        return value


def _parts(rule: Rule | Stacked) -> tuple[Rule, ...]:
    return rule.rules if isinstance(rule, Stacked) else (rule,)


def _first_copies(rules: Rules) -> Rules:
    """The table without tensors that are, in another Block, made of the same sources as one before."""
    first: dict[tuple[str, ...], str] = {}
    for name, rule in rules.items():
        first.setdefault((_IN_BLOCK.sub("", name), *rule.sources), name)
    return {name: rules[name] for name in first.values()}


def _moment(rule: Rule | Stacked, moment: Moment, *, masked: bool) -> Rule | Stacked:
    if isinstance(rule, Rule):
        return _scaled(rule, moment, masked=masked)
    made_of = [[(term.source, (term.gather or (None,))[0]) for term in part.terms] for part in rule.rules]
    parts = []
    for index, part in enumerate(rule.rules):
        scaled = _scaled(part, moment, masked=masked)
        if masked and made_of[index] in made_of[:index]:
            scaled = Rule(tuple(replace(term, coefficient=0.0) for term in part.terms))
        parts.append(scaled)
    return Stacked(tuple(parts))


def _scaled(rule: Rule, moment: Moment, *, masked: bool) -> Rule:
    power = 1 if moment == "exp_avg" else 2
    terms = tuple(replace(term, coefficient=term.gradient**power) for term in rule.terms)
    gather = terms[0].gather or ()
    repeats = any(isinstance(indices, tuple) and len(set(indices)) < len(indices) for indices in gather)
    return Rule(terms, FirstCopy(gather) if masked and repeats else None)
