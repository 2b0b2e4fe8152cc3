"""The card of a sparse model: what it is, what its levels skip and what they cost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raygrow.sparsity.plan import SparsityPlan
from raygrow.sparsity.policy import Policy
from raygrow.weights.folder import ModelFolder

_METHODS = {
    "topk": "the largest entries of every input, as many of every token",
    "larosa": "the largest entries of every input in a calibrated basis, as many of every token (LaRoSA)",
    "wina": "the entries whose magnitude times the norm of their column is largest, as many of every token (WINA)",
    "teal": "the entries above a calibrated threshold (TEAL)",
    "rotated_wina": "in a calibrated basis, the entries whose magnitude times the norm of their column is largest, as "
    "many of every token",
    "relu": "what is not zero: the model was trained to have many hidden units at exactly zero, and nothing else is "
    "dropped",
}
_ROTATIONS = {
    "none": "none: the weights are those of the dense model",
    "global": "one orthogonal matrix for the whole model, inside its weights; no tensors are added",
    "block": "an orthogonal matrix for each block, inside its weights, with an adapter between two blocks",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one level skips, and the losses at it."""

    sparsity: float
    nominal: float
    skipped: float
    losses: Mapping[Policy, float]
    """Nats per token on the validation text, by policy."""

    def perplexity(self, policy: Policy) -> float:
        """Of the validation text."""
        return math.exp(min(self.losses[policy], 700.0))  # beyond, a float overflows

    def rise(self, dense: "Row", policy: Policy) -> float:
        """By what share the perplexity is above that of the dense model."""
        return math.expm1(min(self.losses[policy] - dense.losses[policy], 700.0))

    def told(self, dense: "Row") -> str:
        """One line."""
        return (
            f"sparsity {self.sparsity:g}: {self.skipped:.1%} of the weights skipped, perplexity "
            f"{self.perplexity('decode'):.4g} ({self.rise(dense, 'decode'):+.2%}) decoding, "
            f"{self.perplexity('all'):.4g} ({self.rise(dense, 'all'):+.2%}) with sparse prompts"
        )


def card(
    folder: ModelFolder, plan: SparsityPlan, rows: Sequence[Row], split: str, data: str, validation: Sequence[int]
) -> str:
    """The markdown text.

    Args:
        folder: The dense model.
        plan: Of the sparse one.
        rows: The dense model, then every level.
        split: How levels are split between inputs.
        data: Where the texts come from.
        validation: Sequences of the validation text, and tokens in each.
    """
    dense, *levels = rows
    table = [
        "| sparsity | nominal | weights skipped | perplexity, decoding | perplexity, all tokens |",
        "|---------:|--------:|----------------:|---------------------:|-----------------------:|",
        f"| dense | | | {dense.perplexity('decode'):.4f} | {dense.perplexity('all'):.4f} |",
        *(
            f"| {row.sparsity:g} | {row.nominal:.1%} | {row.skipped:.1%} "
            + "".join(
                f"| {row.perplexity(policy):.4f} ({row.rise(dense, policy):+.2%}) " for policy in ("decode", "all")
            )
            + "|"
            for row in levels
        ),
    ]
    calibration = plan.calibration
    return "\n".join(
        [
            f"# {folder.path.resolve().name}, sparse",
            "",
            f"Made by `raygrow sparsify` from `{folder.path}`. Tokens that are decoded multiply by part of the "
            "weights only; which part depends on the token.",
            "",
            f"- **method** `{plan.method}`: {_METHODS[plan.method]}",
            f"- **rotation** `{plan.rotation}`: {_ROTATIONS[plan.rotation]}",
            f"- **split** of a level between inputs and blocks: `{split}`",
            f"- **calibrated** on {calibration.sequences} sequences of {calibration.seq_len} tokens from `{data}` "
            f"(sha256 {calibration.sha256[:12]})",
            "",
            "## What it costs",
            "",
            *table,
            "",
            f"On {validation[0]} sequences of {validation[1]} tokens of the validation split of `{data}`. *Sparsity* "
            "is what was asked for, *nominal* the share of the blocks' weights that a token does not multiply by, "
            "*weights skipped* the same with adapters counted as read: what is saved of what the dense model's blocks "
            "read. *Decoding* is how the model is served: the first half of each sequence is a prompt and dense, the "
            "second half is sparse and counts. *All tokens* has sparse prompts too.",
            "",
            "## Running it",
            "",
            "```",
            f"raygrow evaluate MODEL --data DATA --sparsity {levels[-1].sparsity:g}",
            "```",
            "",
            "Without a sparsity it is a dense model, the one it was made from up to rounding.",
            "",
        ]
    )
