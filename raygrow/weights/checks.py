"""Checks of a model's tensors: their values, zeros and spread.

Under FSDP each worker measures its own shards and the caller adds up: `tensor_statistics` returns sums only.

Shapes: P parameters (named tensors).
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raygrow.nn.config import ModelConfig
from raygrow.nn.init import init_rule
from raygrow.weights.fills import Fresh
from raygrow.weights.rules import Rule, Rules, Stacked

STD_FACTOR = 100.0
"""A matrix whose standard deviation is this many times off its start, either way, is taken for damaged."""

MAY_START_SILENT = ("o", "down", "router")
"""Modules that growth may start at zero, from where training moves them by small steps: no deviation is too small."""

LARGEST_VALUE = 1e4
"""No weight of a healthy model comes near it."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    passed: bool
    detail: str
    """The figures, in words."""


def tensor_statistics(tensors: Iterable[tuple[str, Tensor]]) -> tuple[list[str], Tensor]:
    """Sums over every tensor, or over one worker's shard of it.

    Returns:
        The names, and a `(P, 6)` fp64 CPU tensor of elements, non-finite elements, non-zero elements, elements beyond
        `LARGEST_VALUE`, sum and sum of squares. Adding up the workers' tensors gives those of the whole model.
    """
    names, rows = [], []
    for name, tensor in tensors:
        names.append(name)
        x = tensor.detach()
        rows.append(
            torch.stack(
                [
                    torch.tensor(x.numel(), device=x.device, dtype=torch.float64),
                    (~x.isfinite()).sum(dtype=torch.float64),
                    x.count_nonzero().double(),
                    (x.abs() > LARGEST_VALUE).sum(dtype=torch.float64),
                    x.sum(dtype=torch.float64),
                    torch.linalg.vector_norm(x, dtype=torch.float64).square(),
                ]
            ).cpu()
        )
    return names, torch.stack(rows)


def statistics_checks(
    names: Sequence[str], statistics: Tensor, config: ModelConfig, *, zeros: Collection[str] = ()
) -> list[Check]:
    """Checks of the range, standard deviation and zeros of every tensor of the whole model.

    Args:
        names: As given by `tensor_statistics`.
        statistics: The sum of all workers' `(P, 6)` statistics.
        config: Of the grown model; `nn/init.py` knows what each of its tensors starts as.
        zeros: Tensors that are meant to be all zeros (see `meant_zeros` and `inherited_zeros`).
    """
    bad_values, odd_zeros, odd_std = [], [], []
    for name, row in zip(names, statistics.tolist(), strict=True):
        elements, non_finite, non_zero, too_large, total, squares = row
        if non_finite or too_large:
            bad_values.append(f"{name} ({int(non_finite)} not finite, {int(too_large)} beyond {LARGEST_VALUE:g})")
            continue
        mean, std = init_rule(name, config)
        if name in zeros:
            if non_zero:
                odd_zeros.append(f"{name} (not zero, as its rule says)")
        elif (mean or std) and not non_zero:
            odd_zeros.append(name)
        elif std:
            measured = math.sqrt(max(squares / elements - (total / elements) ** 2, 0.0))
            smallest = 0.0 if name.split(".")[-2] in MAY_START_SILENT else std / STD_FACTOR
            if not smallest <= measured <= std * STD_FACTOR:
                odd_std.append(f"{name} (std {measured:.3g}, {std:.3g} at the start)")
    meant = f"only the {len(zeros)} tensors that are meant to be are all zeros" if zeros else "no tensor is all zeros"
    return [
        none_of("values", bad_values, "every value is finite and of sensible size"),
        none_of("zeros", odd_zeros, meant),
        none_of("standard deviations", odd_std, f"every one within {STD_FACTOR:g} times of its start"),
    ]


def meant_zeros(rules: Rules) -> frozenset[str]:
    """The targets that their rules make all zeros, such as the output projections of silent Blocks."""
    return frozenset(name for name, rule in rules.items() if _is_zero(rule))


def inherited_zeros(names: Iterable[str], rules: Rules, sources: Mapping[str, Tensor]) -> frozenset[str]:
    """Of the targets `names`, those made of zeros alone: the source may have come with silent Blocks."""
    made_of = {name: rules[name].sources for name in names}
    return frozenset(
        name for name, found in made_of.items() if found and not any(sources[source].any() for source in found)
    )


def none_of(name: str, wrong: Sequence[str], fine: str) -> Check:
    """The check that a list of what is wrong is empty."""
    shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
    return Check(name=name, passed=not wrong, detail=shown or fine)


def _is_zero(rule: Rule | Stacked) -> bool:
    if isinstance(rule, Stacked):
        return all(map(_is_zero, rule.rules))
    filled = rule.fill is not None and not (isinstance(rule.fill, Fresh) and not rule.fill.std)
    return not filled and not any(term.coefficient for term in rule.terms)
