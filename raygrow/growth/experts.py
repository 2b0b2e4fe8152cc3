"""Upcycling: the dense MLP of a Block becomes a mixture of experts, each a copy of it (arXiv 2212.05055).

With the weights of a token's experts summing to 1 (Mixtral's order) equal experts add up to the dense MLP, whatever the
router says, so the function is kept. With softmax over all experts first, the chosen ones have only a share, which
scaled weights make up for on average (arXiv 2410.07524). The router is new and random: at zero it would send every
token to the same experts.
"""

import logging
import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from raygrow.growth.blocks import split_name
from raygrow.growth.growth import Growth
from raygrow.nn.config import ModelConfig
from raygrow.weights.fills import Fresh, Redraw
from raygrow.weights.rules import Rule, Stacked, Term, copy_rule
from raygrow.weights.shapes import parameter_shapes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Makes a dense model a mixture of `n_experts` experts, of which each token goes to `top_k`.

    Raises:
        ValueError: If a number is out of range or the experts are fewer than `top_k`.
    """

    operator: Literal["experts"] = "experts"
    n_experts: int = 8
    top_k: int = 2
    norm_topk_prob: bool = True
    """Whether the weights of a token's experts are made to sum to 1 (the function is kept); if not, they are shares of
    all experts and the copies are scaled up (it is kept on average only)."""
    router_std: float = 0.02
    """Standard deviation of the new router; 0 sends every token to the same experts."""
    drop: float = 0.0
    """Share of each expert's hidden units that is drawn anew, so that experts start apart (Drop-Upcycling, arXiv
    2502.19261, finds 0.5 best over long training); 0 keeps the function."""
    blocks: Literal["all"] | tuple[int, ...] = "all"
    """The Blocks that become mixtures; the others keep their MLP."""
    seed: int = 0
    """Of the router and of what is drawn anew."""

    def __post_init__(self) -> None:
        for name in ("n_experts", "top_k"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be an integer of at least 1")
        if self.n_experts < self.top_k:
            raise ValueError(f"n_experts={self.n_experts}: fewer than top_k={self.top_k}, the experts of one token")
        if not 0 <= self.router_std < math.inf:
            raise ValueError(f"router_std={self.router_std}: must be a number of at least 0")
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop={self.drop}: must be a share from 0 to 1")
        if self.blocks != "all":
            object.__setattr__(self, "blocks", tuple(self.blocks))
            if not self.blocks or len(set(self.blocks)) < len(self.blocks):
                raise ValueError(f"blocks={list(self.blocks)}: must be `all` or a list of different blocks")

    def grow(self, config: ModelConfig) -> Growth:
        """The growth of a dense model of this config.

        Raises:
            ValueError: If the model has experts already, or not the Blocks listed.
        """
        if config.n_experts:
            raise ValueError(
                f"n_experts={config.n_experts}: the model has experts already, only a dense one is upcycled"
            )
        if self.top_k == 1 and self.norm_topk_prob:
            _warn_of_constant_weights()
        target = replace(
            config,
            n_experts=self.n_experts,
            top_k=self.top_k,
            d_expert=config.d_ff,
            norm_topk_prob=self.norm_topk_prob,
            dense_blocks=self._dense_blocks(config.n_blocks),
        )
        rules = {name: self._rule(name, config) for name in parameter_shapes(target)}
        exact = self.norm_topk_prob and not self.drop
        return Growth(config=target, rules=rules, exact=exact, origins=tuple(range(config.n_blocks)))

    def shrink(self, target: ModelConfig) -> ModelConfig:
        """The dense config that grows into `target`.

        Raises:
            ValueError: If the target's experts are not those that this growth makes; names the field.
        """
        made = {
            "n_experts": self.n_experts,
            "top_k": self.top_k,
            "norm_topk_prob": self.norm_topk_prob,
            "d_expert": target.d_ff,
            "dense_blocks": self._dense_blocks(target.n_blocks),
        }
        for name, value in made.items():
            if getattr(target, name) != value:
                raise ValueError(
                    f"{name}={getattr(target, name)!r}: growth to {self.n_experts} experts gives {name}={value!r}, so "
                    "it cannot end in this model; change one of the two"
                )
        return replace(target, n_experts=0, top_k=0, d_expert=0, norm_topk_prob=True, dense_blocks=())

    def _dense_blocks(self, n_blocks: int) -> tuple[int, ...]:
        if self.blocks == "all":
            return ()
        missing = [block for block in self.blocks if not 0 <= block < n_blocks]
        if missing:
            raise ValueError(f"blocks={list(self.blocks)}: the model has no block {missing[0]}, only {n_blocks}")
        return tuple(block for block in range(n_blocks) if block not in self.blocks)

    def _rule(self, name: str, config: ModelConfig) -> Rule | Stacked:
        block, _ = split_name(name)
        module, kind = name.split(".")[-2:]
        if module == "router":
            # in the dtype of a tensor that is small to read
            like = f"blocks.{block}.mlp_norm.weight"
            return Rule(fill=Fresh((self.n_experts, config.d_model), self.router_std, like, name, self.seed))
        if ".experts." not in name:
            return copy_rule(name)
        scale = self._scale(config, module, kind)
        # all experts together have the gradient of the one MLP, and the less of it the more they are scaled up
        term = Term(f"blocks.{block}.mlp.{module}.{kind}", scale, gradient=1 / (self.n_experts * scale))
        return Stacked(tuple(Rule((term,), self._redraw(name, index)) for index in range(self.n_experts)))

    def _scale(self, config: ModelConfig, module: str, kind: str) -> float:
        """The factor on a copy that makes up for weights that sum to `top_k / n_experts` on average."""
        if self.norm_topk_prob:
            return 1.0
        missing = self.n_experts / self.top_k
        # what is added last has to make up for it alone; the matrices do so together
        if (module, kind) == ("down", "bias"):
            return missing
        # what three matrices, or two of which one's output is squared, make together grows by the third power
        return missing ** (1 / 3 if config.gated or config.mlp == "relu2" else 1 / 2)

    def _redraw(self, name: str, expert: int) -> Redraw | None:
        module, kind = name.split(".")[-2:]
        if not self.drop or (module, kind) == ("down", "bias"):  # that one belongs to no hidden unit
            return None
        units = name.partition(".experts.")[0]
        return Redraw(
            axis=1 if module == "down" else 0,
            share=self.drop,
            slices_key=f"units/{units}/{expert}",
            key=f"redraw/{name}/{expert}",
            seed=self.seed,
        )


@cache
def _warn_of_constant_weights() -> None:
    logger.warning(
        "top_k=1 with norm_topk_prob=true: every token's one expert has the weight 1, so that only the load-balancing "
        "loss trains the router; norm_topk_prob=false lets the model's own loss train it"
    )
