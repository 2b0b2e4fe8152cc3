"""The feed-forward half of a Block, and that of every expert. Shapes: B batch, T tokens, D model, F hidden."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raygrow.nn.config import ModelConfig
from raygrow.nn.linear import GroupedLinear, linear

Project = Callable[[int, int], nn.Module]
"""Makes a projection from a size to a size: one MLP's, or those of all experts."""


class Activity(NamedTuple):
    """How much the hidden units of MLPs do: means over units, in fp32 at least."""

    size: Tensor
    """Of their absolute values."""
    active: Tensor
    """Of 1 for each that is not zero, 0 for others."""


class SwigluMlp(nn.Module):
    """`down(silu(gate(x)) * up(x))` (arXiv 2002.05202)."""

    def __init__(self, d_model: int, d_hidden: int, project: Project) -> None:
        super().__init__()
        self.gate = project(d_model, d_hidden)
        self.up = project(d_model, d_hidden)
        self.down = project(d_hidden, d_model)

    def forward(self, x: Tensor, *offsets: Tensor) -> Tensor:
        """`(..., D)` in and out. The projections of experts need to know where the rows of each end (`offsets`)."""
        return self.down(self.hidden(x, *offsets), *offsets)

    def hidden(self, x: Tensor, *offsets: Tensor) -> Tensor:
        """What `down` reads, `(..., F)`."""
        return self.activate(self.gate(x, *offsets), self.up(x, *offsets))

    @staticmethod
    def activate(gate: Tensor, up: Tensor) -> Tensor:
        """What `down` reads, of what the other projections give."""
        return F.silu(gate) * up


class RegluMlp(SwigluMlp):
    """`down(relu(gate(x)) * up(x))` (arXiv 2002.05202)."""

    @staticmethod
    def activate(gate: Tensor, up: Tensor) -> Tensor:
        return F.relu(gate) * up


class GeluMlp(nn.Module):
    """`down(gelu(up(x)))`, the plain MLP of GPT-2."""

    def __init__(self, d_model: int, d_hidden: int, project: Project) -> None:
        super().__init__()
        self.up = project(d_model, d_hidden)
        self.down = project(d_hidden, d_model)

    def forward(self, x: Tensor, *offsets: Tensor) -> Tensor:
        """As `SwigluMlp.forward`."""
        return self.down(self.hidden(x, *offsets), *offsets)

    def hidden(self, x: Tensor, *offsets: Tensor) -> Tensor:
        """As `SwigluMlp.hidden`."""
        return self.activate(self.up(x, *offsets))

    @staticmethod
    def activate(up: Tensor) -> Tensor:
        """As `SwigluMlp.activate`."""
        return F.gelu(up, approximate="tanh")


class ReluMlp(GeluMlp):
    """`down(relu(up(x)))`, the MLP of the first transformers."""

    @staticmethod
    def activate(up: Tensor) -> Tensor:
        return F.relu(up)


class Relu2Mlp(GeluMlp):
    """`down(relu(up(x))^2)` (Primer, arXiv 2109.08668)."""

    @staticmethod
    def activate(up: Tensor) -> Tensor:
        return F.relu(up).square()


KINDS = {"swiglu": SwigluMlp, "gelu": GeluMlp, "reglu": RegluMlp, "relu": ReluMlp, "relu2": Relu2Mlp}
RECTIFIED = RegluMlp, ReluMlp, Relu2Mlp
"""Kinds whose hidden units can be exactly zero (`ModelConfig.rectified`)."""


def mlp(config: ModelConfig) -> nn.Module:
    """The MLP that `config.mlp` names, called with `x_BTD`."""
    return KINDS[config.mlp](config.d_model, config.d_ff, partial(linear, bias=config.mlp_bias))


def experts(config: ModelConfig) -> nn.Module:
    """The same MLP `n_experts` times over, called with rows sorted by expert and where the rows of each end."""
    project = partial(GroupedLinear, config.n_experts, bias=config.mlp_bias)
    return KINDS[config.mlp](config.d_model, config.d_expert, project)


def watched(mlp: nn.Module, x: Tensor, *offsets: Tensor) -> tuple[Tensor, Activity | None]:
    """What an MLP makes of rows, and the Activity of each: of kinds that have zeros, and where gradients are wanted.

    Elsewhere nobody would ask for it, and it costs a pass over the hidden units.
    """
    if not isinstance(mlp, RECTIFIED) or not torch.is_grad_enabled():
        return mlp(x, *offsets), None
    hidden = mlp.hidden(x, *offsets)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    activity = Activity(hidden.abs().mean(-1, dtype=wide), (hidden != 0).to(wide).mean(-1))
    return mlp.down(hidden, *offsets), activity


def readers(mlp: Any) -> list[Any]:
    """The projections that read an MLP's input, in the order that its activation takes them."""
    return [mlp.gate, mlp.up] if hasattr(mlp, "gate") else [mlp.up]


def fusible(mlp: Any) -> bool:
    """Whether a product's kernel can do the activation too: what reads the input is a SwiGLU without biases."""
    return type(mlp) is SwigluMlp and mlp.up.bias is None
