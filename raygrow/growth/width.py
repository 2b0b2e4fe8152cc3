"""Width growth that keeps the function: every hidden vector becomes several equal copies (arXiv 2409.12903).

A vector x of size D becomes `[x x]` of size 2D. A matrix that reads it is tiled along its columns and halved, so that
it adds up to what it was; one that writes such vectors is tiled along its rows. Heads are copied as whole heads, so
rotary positions and the groups of queries around a key-value head stay right. Vocabulary and experts are not copied.

Copies that are equal get equal gradients and stay equal; noise that cancels within pairs of columns, or Adam's momentum
in the first copy only, lets them part.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from raygrow.growth.growth import Growth, refuse_adapters
from raygrow.nn.config import ModelConfig
from raygrow.weights.fills import NoisePairs
from raygrow.weights.rules import Gather, Rule, Stacked, Term
from raygrow.weights.shapes import parameter_shapes

# the dimension that each axis of a weight runs along: outputs, then inputs; a bias has the outputs alone
_AXES = {
    "embedding": ("vocabulary", "d_model"),  # stored the other way round: its outputs are its columns
    "attention_norm": ("d_model",),
    "q": ("heads", "d_model"),
    "k": ("heads", "d_model"),
    "v": ("heads", "d_model"),
    "q_norm": ("head_dim",),
    "k_norm": ("head_dim",),
    "o": ("d_model", "heads"),
    "mlp_norm": ("d_model",),
    "router": ("experts", "d_model"),
    "gate": ("d_ff", "d_model"),
    "up": ("d_ff", "d_model"),
    "down": ("d_model", "d_ff"),
    "norm": ("d_model",),
    "head": ("vocabulary", "d_model"),
}
_NOISY = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True, kw_only=True)
class Width:
    """Makes a model wider by whole factors, with the same function.

    A tied model stays tied by dividing its `logit_scale`, which Hugging Face's Llama has not; `untie` gives it a head
    of its own instead, with the scale worked in.

    Raises:
        ValueError: If a factor is not an integer of at least 1, or the noise is not a number of at least 0.
    """

    operator: Literal["width"] = "width"
    factor: int = 2
    """How many times wider."""
    d_model: int = 0
    """Factor of the hidden size; 0 is `factor`."""
    heads: int = 0
    """Factor of the query and key-value heads, whose size stays; 0 is `factor`."""
    d_ff: int = 0
    """Factor of the MLP's (or every expert's) hidden size; 0 is `factor`."""
    untie: bool = False
    """Whether a tied model gets a head of its own."""
    noise_snr_db: float = 10.0
    """Strength of the noise that lets copies part, as the signal-to-noise ratio in decibels; 0 is none. The function is
    kept, but for rounding."""
    seed: int = 0
    """Of the noise."""

    def __post_init__(self) -> None:
        for name in ("factor", "d_model", "heads", "d_ff"):
            value, least = getattr(self, name), 1 if name == "factor" else 0
            if type(value) is not int or value < least:
                raise ValueError(
                    f"growth {name}={value!r}: width grows by whole factors, integers of at least 1"
                    + (" or 0 for `factor`" if not least else "")
                )
        if not 0 <= self.noise_snr_db < math.inf:
            raise ValueError(f"noise_snr_db={self.noise_snr_db}: must be a number above 0, or 0 for no noise")

    def grow(self, config: ModelConfig) -> Growth:
        """The growth of a model of this config.

        Raises:
            ValueError: If the model is to be untied and has no tied embedding.
        """
        if self.untie and not config.tie_embeddings:
            raise ValueError("untie=true: the model's embedding and head are separate already")
        refuse_adapters(config)
        by = self._factors
        target = replace(
            config,
            d_model=config.d_model * by["d_model"],
            n_heads=config.n_heads * by["heads"],
            n_kv_heads=config.n_kv_heads * by["heads"],
            d_ff=config.d_ff * by["d_ff"],
            d_expert=config.d_expert * by["d_ff"],
            tie_embeddings=config.tie_embeddings and not self.untie,
            logit_scale=self._logit_scale(config),
        )
        shapes = parameter_shapes(config)
        rules = {name: self._rule(name, shapes, config) for name in parameter_shapes(target)}
        return Growth(config=target, rules=rules, exact=True, origins=tuple(range(config.n_blocks)))

    def shrink(self, target: ModelConfig) -> ModelConfig:
        """The config that grows into `target`.

        Raises:
            ValueError: If a size of the target is no multiple of its factor, or the target is tied although the growth
                unties, or has a logit scale then.
        """
        by = self._factors
        for name, factor in (("d_model", "d_model"), ("n_heads", "heads"), ("d_ff", "d_ff"), ("d_expert", "d_ff")):
            size = getattr(target, name)
            if size % by[factor]:
                raise ValueError(
                    f"{name}={size}: width grows by whole factors, and growth {factor}={by[factor]} does not divide it"
                )
        if target.n_kv_heads % by["heads"]:
            raise ValueError(
                f"n_kv_heads={target.n_kv_heads}: grouped-query attention cannot be kept, because growth "
                f"heads={by['heads']} does not divide it; choose another factor for heads"
            )
        if self.untie and (target.tie_embeddings or target.logit_scale != 1):
            raise ValueError(
                "untie=true: gives a model with tie_embeddings=false and logit_scale=1, but the target has "
                f"tie_embeddings={str(target.tie_embeddings).lower()} and logit_scale={target.logit_scale}"
            )
        return replace(
            target,
            d_model=target.d_model // by["d_model"],
            n_heads=target.n_heads // by["heads"],
            n_kv_heads=target.n_kv_heads // by["heads"],
            d_ff=target.d_ff // by["d_ff"],
            d_expert=target.d_expert // by["d_ff"],
            tie_embeddings=target.tie_embeddings or self.untie,
            logit_scale=target.logit_scale * (by["d_model"] if target.tie_embeddings else 1),
        )

    @property
    def _factors(self) -> dict[str, int]:
        """By dimension; what is not in here is not copied."""
        return {name: getattr(self, name) or self.factor for name in ("d_model", "heads", "d_ff")}

    def _logit_scale(self, config: ModelConfig) -> float:
        if not config.tie_embeddings:
            return config.logit_scale  # the head itself is divided
        return 1.0 if self.untie else config.logit_scale / self._factors["d_model"]

    def _rule(self, name: str, shapes: Mapping[str, Sequence[int]], config: ModelConfig) -> Rule | Stacked:
        module, kind = name.split(".")[-2:]
        axes = _AXES[module][:1] if kind == "bias" else _AXES[module]
        factors = [self._factors.get(axis, 1) for axis in axes]
        writes, *reads = reversed(factors) if module == "embedding" else factors
        copies = math.prod(reads)
        # Each copy of an output has its share of the gradient. A matrix that is embedding and head at once follows the
        # rule in both: the gradient as a head is smaller by the logit scale.
        term = Term(name, coefficient=1 / copies, gradient=1 / writes)
        if name == "head.weight" and config.tie_embeddings:
            scale = config.logit_scale
            term = Term("embedding.weight", coefficient=scale / copies, gradient=1 / scale)
        sizes = shapes[term.source][-len(axes) :]
        gather = tuple(_tile(size, factor) for size, factor in zip(sizes, factors, strict=True))
        noisy = self.noise_snr_db > 0 and module in _NOISY and copies > 1

        def rule(gather: Gather, key: str) -> Rule:
            noise = NoisePairs(copies, self.noise_snr_db, f"noise/{key}", self.seed) if noisy else None
            return Rule((replace(term, gather=gather),), noise)

        if not any(gather):
            return Rule((term,))
        if ".experts." in name:
            return Stacked(tuple(rule((index, *gather), f"{name}/{index}") for index in range(config.n_experts)))
        return rule(gather, name)


@cache
def _tile(size: int, copies: int) -> tuple[int, ...] | None:
    return tuple(range(size)) * copies if copies > 1 else None
