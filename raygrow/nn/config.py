"""The shape of a model: everything that decides which tensors a Rack holds and what they compute."""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Rack of `n_stacks` Stacks of `blocks_per_stack` Blocks.

    The grouping into Stacks is data: parameter names run flat over all Blocks, so regrouping renames nothing.

    Raises:
        ValueError: If a field is of the wrong type or out of range, or two fields contradict each other.
    """

    vocab_size: int
    d_model: int
    n_heads: int
    n_kv_heads: int = 0
    """Key and value heads; 0 means `n_heads` (multi-head attention), fewer is grouped-query attention."""
    head_dim: int = 0
    """Size of one head; 0 means `d_model / n_heads`."""
    d_ff: int
    n_stacks: int = 1
    blocks_per_stack: int
    max_seq_len: int = 2048
    mlp: Literal["swiglu", "gelu", "reglu", "relu", "relu2"] = "swiglu"
    """Of the hidden units of a `reglu` (gated), `relu` or `relu2` (squared), many are exactly zero."""
    n_experts: int = 0
    """Experts of a mixture-of-experts MLP; 0 is a dense model."""
    top_k: int = 0
    """Experts that each token goes to; 0 in a dense model."""
    d_expert: int = 0
    """Hidden size of one expert; 0 means `d_ff`."""
    norm_topk_prob: bool = True
    """Whether the weights of a token's experts are made to sum to 1 (Mixtral); if not, they are shares of all."""
    dense_blocks: tuple[int, ...] = ()
    """Blocks of a mixture-of-experts model that keep a dense MLP."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    qk_norm: bool = False
    attention_mode: Literal["causal", "bidirectional"] = "causal"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    logit_scale: float = 1.0
    """Factor on the logits. Width growth needs it to keep a tied model's function."""
    init_std: float = 0.02
    rotation: Literal["none", "global", "block"] = "none"
    """The basis of the residual stream, where it was turned for activation sparsity: one basis for the whole model, or
    one of each Block, with an adapter from basis to basis between two Blocks."""

    def __post_init__(self) -> None:
        self._check_types()
        if not self.n_kv_heads:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        self._check_numbers()
        if not self.head_dim:
            if self.d_model % self.n_heads:
                raise ValueError(
                    f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}: set head_dim to choose one"
                )
            object.__setattr__(self, "head_dim", self.d_model // self.n_heads)
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: rotary positions need an even head_dim")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if self.rotation != "none" and self.norm != "rmsnorm":
            raise ValueError(f"rotation={self.rotation!r}: only rmsnorm is the same in every basis, not {self.norm}")
        self._check_experts()

    def _check_numbers(self) -> None:
        sizes = ("vocab_size", "d_model", "n_heads", "n_kv_heads", "d_ff", "n_stacks", "blocks_per_stack")
        for name in (*sizes, "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("rope_theta", "logit_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number above 0")
        for name in ("norm_eps", "init_std"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number of at least 0")

    def _check_experts(self) -> None:
        if not self.n_experts:
            for name in ("top_k", "d_expert", "dense_blocks"):
                if getattr(self, name):
                    raise ValueError(f"{name}={getattr(self, name)}: a dense model (n_experts=0) has none")
            return
        if not 1 <= self.top_k <= self.n_experts:
            raise ValueError(f"top_k={self.top_k}: must be from 1 to n_experts={self.n_experts}")
        if self.d_expert < 0:
            raise ValueError(f"d_expert={self.d_expert}: must be at least 1, or 0 for d_ff")
        object.__setattr__(self, "d_expert", self.d_expert or self.d_ff)
        object.__setattr__(self, "dense_blocks", tuple(sorted(set(self.dense_blocks))))
        wrong = [block for block in self.dense_blocks if not 0 <= block < self.n_blocks]
        if wrong or len(self.dense_blocks) == self.n_blocks:
            raise ValueError(
                f"dense_blocks={list(self.dense_blocks)}: must be some of the blocks 0 to {self.n_blocks - 1}, not all"
            )

    def _check_types(self) -> None:
        # a config.json may hold anything, and an unknown choice would only fail when the model is built, or never
        for name, hint in get_type_hints(ModelConfig).items():
            value = getattr(self, name)
            if get_origin(hint) is Literal:
                if value not in get_args(hint):
                    raise ValueError(f"{name}={value!r}: must be one of {', '.join(get_args(hint))}")
            elif get_origin(hint) is tuple:
                if not isinstance(value, list | tuple) or not all(type(item) is int for item in value):
                    raise ValueError(f"{name}={value!r}: must be a list of integers")
                object.__setattr__(self, name, tuple(value))
            elif type(value) not in ((int, float) if hint is float else (hint,)):  # true is no number
                raise ValueError(f"{name}={value!r}: must be of type {hint.__name__}")

    @property
    def n_blocks(self) -> int:
        """Blocks in the whole Rack."""
        return self.n_stacks * self.blocks_per_stack

    @property
    def gated(self) -> bool:
        """Whether an MLP's hidden units are the product of two projections."""
        return self.mlp in ("swiglu", "reglu")

    @property
    def rectified(self) -> bool:
        """Whether hidden units of an MLP can be exactly zero."""
        return self.mlp in ("reglu", "relu", "relu2")

    def has_experts(self, block: int) -> bool:
        """Whether the MLP of a Block is a mixture of experts."""
        return self.n_experts > 0 and block not in self.dense_blocks

    def has_adapter(self, block: int) -> bool:
        """Whether a Block turns the residual stream into the basis of the next one."""
        return self.rotation == "block" and block < self.n_blocks - 1

    def regrouped(self, n_stacks: int) -> "ModelConfig":
        """The same Blocks in another number of Stacks.

        Raises:
            ValueError: If the Blocks do not divide into that many Stacks.
        """
        if self.n_blocks % n_stacks:
            raise ValueError(f"{self.n_blocks} blocks do not divide into n_stacks={n_stacks}")
        return replace(self, n_stacks=n_stacks, blocks_per_stack=self.n_blocks // n_stacks)
