"""When to grow: the published fit for the tokens that a base should see before Gstack (arXiv 2405.15319, Eq. 2).

    log10(d) = 0.88 log10(N) + 163.27 / log10(C) - 5.74        C = 6 N D

d tokens for the base, N non-embedding parameters of the target, D tokens of the run at the target's size, C its FLOPs.
The fit is the authors'; below its range it asks for more tokens than a run has, so a share of the FLOPs takes over.
`growth/timing_fit.py` fits the same form to other runs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

PUBLISHED = {"a": 0.88, "b": 163.27, "c": -5.74}
"""The constants of log10(d) = a log10(N) + b / log10(C) + c."""
FIT_PARAMS = (0.41e9, 3e9)
FIT_FLOPS = (0.8e20, 12e20)
LARGEST_BASE_SHARE = 0.20
"""In the range of the fit its optimum is a small part of the compute; a larger one is not what it was made for."""
DEFAULT_BASE_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What the fit says for one run, and what to do."""

    params: float
    """Non-embedding parameters of the target."""
    tokens: float
    """Tokens that the run's FLOPs would train the target on from scratch."""
    factor: int
    flops: float
    """Of the whole run, 6 x params x tokens."""
    fitted_base_tokens: float
    """Tokens of the base by the formula (d)."""
    fitted_base_share: float
    """Share of the run's FLOPs that a base of `params / factor` spends on that many tokens. May exceed 1."""
    outside_fit: tuple[str, ...]
    """Why the formula is an extrapolation here; empty inside the range of the fit."""
    base_share: float
    """The share to use: the fitted one, or the default where that is too large."""
    base_tokens: float
    """The base's tokens at that share."""

    @property
    def follows_fit(self) -> bool:
        """Whether the advice is the formula's own."""
        return self.base_share == self.fitted_base_share


def growth_timing(params: float, tokens: float, *, factor: int = 4, share: float = DEFAULT_BASE_SHARE) -> Timing:
    """How many tokens to train the base on before growing it.

    Args:
        params: Non-embedding parameters of the target, at least 1.
        tokens: Tokens of the run, counted at the target's size, at least 1.
        factor: How many times deeper the target is than the base.
        share: Proposed share of the run's FLOPs for the base where the formula asks for more than 20 %.

    Raises:
        ValueError: If an argument is out of range.
    """
    for name, value in {"params": params, "tokens": tokens, "factor": factor}.items():
        if not 1 <= value < math.inf:
            raise ValueError(f"{name}={value}: must be a number of at least 1")
    if not 0 < share <= LARGEST_BASE_SHARE:
        raise ValueError(f"share={share}: must be above 0 and at most {LARGEST_BASE_SHARE}")
    flops = 6 * params * tokens
    fitted_tokens = formula(params, flops)
    # the base has params / factor parameters, so its tokens cost that much less
    fitted_share = fitted_tokens / (factor * tokens)
    follows = fitted_share <= LARGEST_BASE_SHARE
    return Timing(
        params=params,
        tokens=tokens,
        factor=factor,
        flops=flops,
        fitted_base_tokens=fitted_tokens,
        fitted_base_share=fitted_share,
        outside_fit=_outside_fit(params, flops),
        base_share=fitted_share if follows else share,
        base_tokens=fitted_tokens if follows else share * factor * tokens,
    )


def formula(params: float, flops: float, constants: Mapping[str, float] = PUBLISHED) -> float:
    """Tokens of the base: 10 ** (a log10(params) + b / log10(flops) + c)."""
    return 10 ** (constants["a"] * math.log10(params) + constants["b"] / math.log10(flops) + constants["c"])


def describe(timing: Timing) -> str:
    """The advice in plain words, with the figures."""
    t = timing
    lines = [
        f"target        {_number(t.params)} non-embedding parameters, {_number(t.tokens)} tokens, {t.flops:.3g} FLOPs",
        f"formula       train the base on {_number(t.fitted_base_tokens)} tokens, then grow it by {t.factor}",
        f"base's cost   {_share(t.fitted_base_share)} the run's FLOPs",
    ]
    if t.outside_fit:
        lines.append(f"caution       extrapolated: {'; '.join(t.outside_fit)}")
    if not t.follows_fit:
        lines.append(
            f"proposal      {_share(t.base_share)} the FLOPs instead, {_number(t.base_tokens)} tokens of base: one "
            f"that costs over {LARGEST_BASE_SHARE:.0%} of the run leaves growth too little to save. The formula was "
            "fitted on far longer runs; at this size, search the share"
        )
    return "\n".join(lines)


def _outside_fit(params: float, flops: float) -> tuple[str, ...]:
    reasons = []
    for what, value, (low, high) in (("N", params, FIT_PARAMS), ("C", flops, FIT_FLOPS)):
        if not low <= value <= high:
            side = "below" if value < low else "above"
            reasons.append(f"{what}={value:.3g} is {side} the fitted range {low:.3g} to {high:.3g}")
    return tuple(reasons)


def _number(value: float) -> str:
    """Four digits and an exponent in steps of three, as in 11.11e9."""
    exponent = 3 * math.floor(math.log10(value) / 3)
    return f"{value / 10**exponent:.4g}" + (f"e{exponent}" if exponent else "")


def _share(share: float) -> str:
    return f"{share:.2%} of" if share < 1 else f"{share:.3g} times"
