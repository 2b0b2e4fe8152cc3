"""The feed-forward half of a Block, and that of every expert. Shapes: B batch, T tokens, D model, F hidden."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from raygrow.nn.config import ModelConfig
from raygrow.nn.linear import GroupedLinear, linear

Project = Callable[[int, int], nn.Module]
"""Makes a projection from a size to a size: one MLP's, or those of all experts."""


class SwigluMlp(nn.Module):
    """`down(silu(gate(x)) * up(x))` (arXiv 2002.05202)."""

    def __init__(self, d_model: int, d_hidden: int, project: Project) -> None:
        super().__init__()
        self.gate = project(d_model, d_hidden)
        self.up = project(d_model, d_hidden)
        self.down = project(d_hidden, d_model)

    def forward(self, x: Tensor, *offsets: Tensor) -> Tensor:
        """`(..., D)` in and out. The projections of experts need to know where the rows of each end (`offsets`)."""
        return self.down(self.activate(self.gate(x, *offsets), self.up(x, *offsets)), *offsets)

    @staticmethod
    def activate(gate: Tensor, up: Tensor) -> Tensor:
        """What `down` reads."""
        return F.silu(gate) * up


class GeluMlp(nn.Module):
    """`down(gelu(up(x)))`, the plain MLP of GPT-2."""

    def __init__(self, d_model: int, d_hidden: int, project: Project) -> None:
        super().__init__()
        self.up = project(d_model, d_hidden)
        self.down = project(d_hidden, d_model)

    def forward(self, x: Tensor, *offsets: Tensor) -> Tensor:
        """As `SwigluMlp.forward`."""
        return self.down(self.activate(self.up(x, *offsets)), *offsets)

    @staticmethod
    def activate(up: Tensor) -> Tensor:
        """As `SwigluMlp.activate`."""
        return F.gelu(up, approximate="tanh")


KINDS = {"swiglu": SwigluMlp, "gelu": GeluMlp}


def mlp(config: ModelConfig) -> nn.Module:
    """The MLP that `config.mlp` names, called with `x_BTD`."""
    return KINDS[config.mlp](config.d_model, config.d_ff, partial(linear, bias=config.mlp_bias))


def experts(config: ModelConfig) -> nn.Module:
    """The same MLP `n_experts` times over, called with rows sorted by expert and where the rows of each end."""
    project = partial(GroupedLinear, config.n_experts, bias=config.mlp_bias)
    return KINDS[config.mlp](config.d_model, config.d_expert, project)
