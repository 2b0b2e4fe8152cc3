"""The verifier: what a grown model says, against its source, its promise and the prediction.

A pure function of what both models say on the same tokens. An exact growth is held to rounding, after every Block; of
any other the same figures are reported as drift.

Shapes: B batch, T tokens, D model, E experts, V vocabulary.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from raygrow.nn import cost
from raygrow.nn.config import ModelConfig
from raygrow.weights.checks import Check

EXACT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest relative difference of a function-preserving growth, by the dtype that is compared."""


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What a model says on fixed tokens."""

    logits_BTV: Tensor
    residuals_BTD: Sequence[Tensor]
    """The residual stream after every Block."""
    router_logits_BTE: Mapping[int, Tensor]
    """Of every Block that has experts."""
    loss: float
    """Nats per token on a fixed validation batch."""


@dataclass(frozen=True, kw_only=True)
class BlockDrift:
    """How a Block of the grown model compares with the Block of the source that it stands for."""

    block: int
    source: int
    residual: float
    """Difference of the residual stream after them, relative to the source's; of the worst copy that width made."""
    router: float | None = None
    """Difference of the router's logits, relative to the source's."""
    router_scale: float | None = None
    """Standard deviation of the router's logits, as a multiple of the source's."""
    rerouted: float | None = None
    """Share of the tokens' places at experts that have gone to another expert."""


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
    blocks: list[BlockDrift] = field(default_factory=list)
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
        return _finite(asdict(self) | {"loss_jump": self.loss_jump, "passed": self.passed})


def verify(
    before: Outputs,
    after: Outputs,
    *,
    operator: dict[str, Any],
    exact: bool,
    origins: Sequence[int],
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
        origins: For each Block of the grown model, the Block of the source that it comes from.
        source: Config of the source.
        target: Config of the grown model.
        parameters: Parameters that the grown model really has.
        checks: Results of what was looked at in the tensors themselves.
        max_loss_jump: Nats per token that the loss may rise by; None allows any finite loss.
    """
    blocks = block_drifts(before, after, origins, top_k=target.top_k)
    predicted = cost.parameters(target)
    found = [
        Check(
            name="parameter count",
            passed=parameters == predicted,
            detail=f"{parameters:,} parameters, {predicted:,} predicted",
        ),
        _rope_check(source, target),
        *_router_checks(blocks, after, exact=exact),
        _identity_check(blocks, before.logits_BTV, after.logits_BTV, exact=exact),
        _loss_check(before.loss, after.loss, max_loss_jump),
    ]
    return Verification(
        operator=operator,
        exact=exact,
        source_parameters=cost.parameters(source),
        parameters=parameters,
        predicted_parameters=predicted,
        output_difference=output_difference(before.logits_BTV, after.logits_BTV),
        loss_before=before.loss,
        loss_after=after.loss,
        max_loss_jump=max_loss_jump,
        blocks=blocks,
        checks=[*found, *checks],
    )


def output_difference(before_BTV: Tensor, after_BTV: Tensor) -> float:
    """Largest absolute difference, relative to the largest absolute value before."""
    largest = before_BTV.double().abs().max()
    return float((after_BTV.double() - before_BTV.double()).abs().max() / largest.clamp(min=1e-300))


def block_drifts(before: Outputs, after: Outputs, origins: Sequence[int], *, top_k: int) -> list[BlockDrift]:
    """Compares every Block of the grown model with the source, in order.

    A copy of a Block that came before stands where the source was last: in an exact growth it adds nothing. So the
    residual stream after a Block is compared with that after the furthest Block that the source has reached. Routers
    are compared in a Block's first copy, which alone reads what its origin reads.
    """
    drifts, reached = [], -1
    for block, origin in enumerate(origins):
        is_first, reached = origin not in origins[:block], max(reached, origin)
        residual = _residual_difference(before.residuals_BTD[reached], after.residuals_BTD[block])
        drift = {"block": block, "source": reached, "residual": residual}
        if is_first and origin in before.router_logits_BTE and block in after.router_logits_BTE:
            drift |= _router_drift(before.router_logits_BTE[origin], after.router_logits_BTE[block], top_k)
        drifts.append(BlockDrift(**drift))
    return drifts


def _residual_difference(before_BTD: Tensor, after_BTD: Tensor) -> float:
    """That of the worst copy; a wider model holds several copies of the stream side by side."""
    copies = after_BTD.unflatten(-1, (-1, before_BTD.shape[-1])).unbind(-2)
    return max(_relative_difference(before_BTD, copy_BTD) for copy_BTD in copies)


def _router_drift(before_BTE: Tensor, after_BTE: Tensor, top_k: int) -> dict[str, float]:
    before, after = before_BTE.double(), after_BTE.double()
    chosen_before, chosen_after = (
        torch.zeros_like(logits).scatter(-1, logits.topk(top_k).indices, 1.0) for logits in (before, after)
    )
    return {
        "router": _relative_difference(before_BTE, after_BTE),
        "router_scale": float(after.std() / before.std()) if before.any() else 1.0,
        "rerouted": float((chosen_after - chosen_before).clamp(min=0).sum() / chosen_before.sum()),
    }


def _relative_difference(before: Tensor, after: Tensor) -> float:
    """Of all tokens together: in bf16 a single one may go to another expert for a rounding, which alone says little."""
    size = torch.linalg.vector_norm(before.double()).clamp(min=1e-300)
    return float(torch.linalg.vector_norm(after.double() - before.double()) / size)


def _rope_check(source: ModelConfig, target: ModelConfig) -> Check:
    kept = (source.head_dim, source.rope_theta) == (target.head_dim, target.rope_theta)
    detail = f"head_dim {target.head_dim} and theta {target.rope_theta:g} are those of the source"
    if not kept:
        detail = (
            f"head_dim {source.head_dim} -> {target.head_dim}, theta {source.rope_theta:g} -> {target.rope_theta:g}: "
            "rotary positions would mean something else"
        )
    return Check(name="rope integrity", passed=kept, detail=detail)


def _router_checks(blocks: Sequence[BlockDrift], after: Outputs, *, exact: bool) -> Iterator[Check]:
    routed = [drift for drift in blocks if drift.router is not None]
    if not routed:
        return
    worst = _worst(routed, "router")
    tolerance = EXACT_TOLERANCE[after.router_logits_BTE[worst.block].dtype]
    scales = [drift.router_scale or 0.0 for drift in routed]
    rerouted = sum(drift.rerouted or 0.0 for drift in routed) / len(routed)
    detail = (
        f"router logits differ by at most {worst.router:.3g} of their size (Block {worst.block}), their scale is "
        f"{min(scales):.4g} to {max(scales):.4g} times the source's, {rerouted:.2%} of the tokens' places moved"
    )
    yield Check(name="router logit scale", **_judged(worst.router or 0.0, tolerance, detail, exact=exact))


def _identity_check(blocks: Sequence[BlockDrift], before_BTV: Tensor, after_BTV: Tensor, *, exact: bool) -> Check:
    worst, output = _worst(blocks, "residual"), _relative_difference(before_BTV, after_BTV)
    detail = (
        f"the residual stream differs by at most {worst.residual:.3g} of its size (after Block {worst.block}, Block "
        f"{worst.source} of the source), the logits by {output:.3g}"
    )
    # whichever is not a number decides
    difference = max(worst.residual, output, key=lambda value: math.inf if math.isnan(value) else value)
    return Check(
        name="functional identity", **_judged(difference, EXACT_TOLERANCE[after_BTV.dtype], detail, exact=exact)
    )


def _judged(difference: float, tolerance: float, detail: str, *, exact: bool) -> dict[str, Any]:
    if not exact:
        return {"passed": True, "detail": f"drift, since this growth changes the function: {detail}"}
    return {"passed": difference <= tolerance, "detail": f"{detail}; at most {tolerance:g} is rounding"}


def _worst(blocks: Sequence[BlockDrift], key: str) -> BlockDrift:
    return max(blocks, key=lambda drift: math.inf if math.isnan(getattr(drift, key)) else getattr(drift, key))


def _loss_check(before: float, after: float, max_loss_jump: float | None) -> Check:
    detail = f"loss {before:.4f} before growth, {after:.4f} after, a rise of {after - before:.4f} nats"
    if max_loss_jump is not None:
        detail += f" where max_loss_jump={max_loss_jump:g} are allowed"
    allowed = math.inf if max_loss_jump is None else max_loss_jump
    return Check(name="loss jump", passed=math.isfinite(after) and after - before <= allowed, detail=detail)


def _finite(tree: Any) -> Any:
    """The tree with null for every number that is not finite."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
