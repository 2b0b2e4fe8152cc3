"""The four activations of a Block whose entries can be dropped, and what a dropped entry saves."""

from collections.abc import Iterator
from typing import Literal, get_args

from raygrow.nn.config import ModelConfig

Input = Literal["attention", "o", "mlp", "down"]
"""What a projection reads: `attention` is read by q, k and v, `mlp` by gate and up, or by all experts."""

INPUTS: tuple[Input, ...] = get_args(Input)
ROTATED: tuple[Input, ...] = ("attention", "mlp")
"""Inputs that come from the residual stream, and turn with it."""

Place = tuple[int, Input]
"""A Block and one of its inputs."""


def places(config: ModelConfig) -> Iterator[Place]:
    """Every input of every Block."""
    return ((block, name) for block in range(config.n_blocks) for name in INPUTS)


def input_size(config: ModelConfig, block: int, name: Input) -> int:
    """Entries of an input."""
    if name == "o":
        return config.n_heads * config.head_dim
    if name == "down":
        return config.d_expert if config.has_experts(block) else config.d_ff
    return config.d_model


def input_weights(config: ModelConfig, block: int, name: Input) -> int:
    """Weights that a token multiplies an input by: those of the experts that it goes to, where there are experts."""
    c, size = config, input_size(config, block, name)
    if name == "attention":
        return size * (c.n_heads + 2 * c.n_kv_heads) * c.head_dim
    if name == "o":
        return size * c.d_model
    experts, hidden = (c.top_k, c.d_expert) if c.has_experts(block) else (1, c.d_ff)
    if name == "down":
        return experts * size * c.d_model
    return experts * size * hidden * (2 if c.gated else 1)


def adapter_share(config: ModelConfig) -> float:
    """Weights of all adapters as a share of those that a token reads in the Blocks of a model without adapters.

    0 for a model that has none. Norms and biases count nothing.
    """
    adapters = sum(config.has_adapter(block) for block in range(config.n_blocks)) * config.d_model**2
    return adapters / block_weights(config)


def block_weights(config: ModelConfig) -> int:
    """Weights that a token reads in all Blocks when no input is sparse and there are no adapters: routers included."""
    routers = sum(map(config.has_experts, range(config.n_blocks))) * config.n_experts * config.d_model
    return routers + sum(input_weights(config, *place) for place in places(config))
