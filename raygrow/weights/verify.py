"""The verifier: what a grown model says and holds, against its source and the prediction.

Everything here is a pure function of plain tensors. Under FSDP each worker measures its own shards and the caller sums:
`tensor_statistics` returns sums only, and a `Check` is passed when every worker passed it.

Shapes: B batch, T tokens, V vocabulary, P parameters (named tensors).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from raygrow.nn import cost
from raygrow.nn.config import ModelConfig
from raygrow.nn.init import init_rule

EXACT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest output difference of a function-preserving growth, relative to the largest logit, by the logits' dtype."""

STD_FACTOR = 100.0
"""A matrix whose standard deviation is this many times off its start, either way, is taken for damaged."""

LARGEST_VALUE = 1e4
"""No weight of a healthy model comes near it."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    passed: bool
    detail: str
    """The figures, in words."""


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What a model says on fixed tokens."""

    logits_BTV: Tensor
    loss: float
    """Nats per token on a fixed validation batch."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The record of one growth, written to `growth/<phase>.json`."""

    operator: dict[str, Any]
    exact: bool
    source_parameters: int
    parameters: int
    predicted_parameters: int
    output_difference: float
    """Largest difference of a logit, relative to the largest logit of the source."""
    loss_before: float
    loss_after: float
    max_loss_jump: float | None
    checks: list[Check] = field(default_factory=list)

    @property
    def loss_jump(self) -> float:
        """Nats per token that the loss rose by."""
        return self.loss_after - self.loss_before

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def failure(self) -> str | None:
        """One paragraph with the figures of what failed; None when nothing did."""
        if self.passed:
            return None
        operator = " ".join(f"{key}={value}" for key, value in self.operator.items())
        failed = "; ".join(f"{check.name}: {check.detail}" for check in self.checks if not check.passed)
        return (
            f"growth with {operator} failed its verification, nothing was trained with it. {failed}. "
            f"(parameters {self.source_parameters:,} -> {self.parameters:,}, "
            f"loss {self.loss_before:.4f} -> {self.loss_after:.4f}, output difference {self.output_difference:.3g})"
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready tree; figures that are not finite become null."""
        tree = asdict(self) | {"loss_jump": self.loss_jump, "passed": self.passed}
        return {key: _finite_or_none(value) for key, value in tree.items()}


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


def statistics_checks(names: Sequence[str], statistics: Tensor, config: ModelConfig) -> list[Check]:
    """Checks of the range, standard deviation and zeros of every tensor of the whole model.

    Args:
        names: As given by `tensor_statistics`.
        statistics: The sum of all workers' `(P, 6)` statistics.
        config: Of the grown model; `nn/init.py` knows what each of its tensors starts as.
    """
    bad_values, all_zero, odd_std = [], [], []
    for name, row in zip(names, statistics.tolist(), strict=True):
        elements, non_finite, non_zero, too_large, total, squares = row
        if non_finite or too_large:
            bad_values.append(f"{name} ({int(non_finite)} not finite, {int(too_large)} beyond {LARGEST_VALUE:g})")
            continue
        mean, std = init_rule(name, config)
        if (mean or std) and not non_zero:
            all_zero.append(name)
        elif std:
            measured = math.sqrt(max(squares / elements - (total / elements) ** 2, 0.0))
            if not std / STD_FACTOR <= measured <= std * STD_FACTOR:
                odd_std.append(f"{name} (std {measured:.3g}, {std:.3g} at the start)")
    return [
        _none_of("values", bad_values, "every value is finite and of sensible size"),
        _none_of("zeros", all_zero, "no tensor is all zeros"),
        _none_of("standard deviations", odd_std, f"every one within {STD_FACTOR:g} times of its start"),
    ]


def verify(
    before: Outputs,
    after: Outputs,
    *,
    operator: dict[str, Any],
    exact: bool,
    source: ModelConfig,
    target: ModelConfig,
    parameters: int,
    checks: Iterable[Check] = (),
    max_loss_jump: float | None = None,
) -> Verification:
    """Judges a growth from what both models say on the same tokens.

    Args:
        before: The source's outputs.
        after: The grown model's.
        operator: The operator's config as a dict, for the record.
        exact: Whether growth promised to keep the function.
        source: Config of the source.
        target: Config of the grown model.
        parameters: Parameters that the grown model really has.
        checks: Results of `statistics_checks` and of the operator's own checks.
        max_loss_jump: Nats per token that the loss may rise by; None allows any finite loss.
    """
    difference = output_difference(before.logits_BTV, after.logits_BTV)
    predicted = cost.parameters(target)
    found = [
        Check(
            name="parameter count",
            passed=parameters == predicted,
            detail=f"{parameters:,} parameters, {predicted:,} predicted",
        ),
        _loss_check(before.loss, after.loss, max_loss_jump),
    ]
    if exact:
        tolerance = EXACT_TOLERANCE[after.logits_BTV.dtype]
        found.append(
            Check(
                name="same function",
                passed=difference <= tolerance,
                detail=f"outputs differ by {difference:.3g} of the largest logit, at most {tolerance:g} is rounding",
            )
        )
    return Verification(
        operator=operator,
        exact=exact,
        source_parameters=cost.parameters(source),
        parameters=parameters,
        predicted_parameters=predicted,
        output_difference=difference,
        loss_before=before.loss,
        loss_after=after.loss,
        max_loss_jump=max_loss_jump,
        checks=[*found, *checks],
    )


def output_difference(before_BTV: Tensor, after_BTV: Tensor) -> float:
    """Largest absolute difference, relative to the largest absolute value before."""
    largest = before_BTV.double().abs().max()
    return float((after_BTV.double() - before_BTV.double()).abs().max() / largest.clamp(min=1e-300))


def _loss_check(before: float, after: float, max_loss_jump: float | None) -> Check:
    detail = f"loss {before:.4f} before growth, {after:.4f} after, a rise of {after - before:.4f} nats"
    if max_loss_jump is not None:
        detail += f" where max_loss_jump={max_loss_jump:g} are allowed"
    allowed = math.inf if max_loss_jump is None else max_loss_jump
    return Check(name="loss", passed=math.isfinite(after) and after - before <= allowed, detail=detail)


def _none_of(name: str, wrong: list[str], fine: str) -> Check:
    shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
    return Check(name=name, passed=not wrong, detail=shown or fine)


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
