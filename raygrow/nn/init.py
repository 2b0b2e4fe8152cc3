"""How each parameter starts. One table, so that growth can tell what a fresh parameter would have looked like.

| parameter                                                 | start                             |
|-----------------------------------------------------------|-----------------------------------|
| `embedding`, `head`, `q k v`, `gate up`, `router` weights | N(0, init_std)                    |
| `o`, `down` weights (into the residual stream)            | N(0, init_std / sqrt(2 n_blocks)) |
| `adapter` weights                                         | the identity                      |
| norm weights                                              | 1                                 |
| biases                                                    | 0                                 |

Stacked tensors of experts start as those of a dense MLP do, every expert with values of its own. The scaled residual
projections are GPT-2's: they keep the variance of the residual stream independent of depth.
"""

import math

import torch
from torch import Tensor, nn

from raygrow.nn.config import ModelConfig


def init_rule(name: str, config: ModelConfig) -> tuple[float, float]:
    """Mean and standard deviation that the parameter `name` starts with (a deviation of 0 is a constant).

    An adapter's are those of the entries of any orthogonal matrix.
    """
    *_, module, kind = name.split(".")
    if kind == "bias":
        return 0.0, 0.0
    if module.endswith("norm"):
        return 1.0, 0.0
    if module in ("o", "down"):
        return 0.0, config.init_std / math.sqrt(2 * config.n_blocks)
    if module == "adapter":
        return 0.0, config.d_model**-0.5
    return 0.0, config.init_std


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """The fp32 CPU tensor that the parameter `name` starts as: a pure function of its name and the seed.

    Being keyed by name, it is the same for every worker count and does not change when other parameters come or go.
    """
    if name.endswith(".adapter.weight"):
        return torch.eye(config.d_model)
    mean, std = init_rule(name, config)
    if not std:
        return torch.full(shape, mean)
    generator = torch.Generator().manual_seed(seed_of(name, seed))
    return torch.empty(shape).normal_(mean, std, generator=generator)


def init_weights(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fills an unsharded model in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, config, seed))


def seed_of(name: str, seed: int) -> int:
    """A seed for the random numbers of one name: the same in every process, unrelated for other names and seeds."""
    # FNV-1a: Python's own hash() of a string differs between processes
    value = 0xCBF29CE484222325 ^ seed
    for byte in name.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value % 2**63
