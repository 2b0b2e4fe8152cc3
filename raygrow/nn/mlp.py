"""The feed-forward half of a Block. Shapes: B batch, T tokens, D model, F hidden."""

import torch.nn.functional as F
from torch import Tensor, nn

from raygrow.nn.config import ModelConfig
from raygrow.nn.linear import linear


class SwigluMlp(nn.Module):
    """`down(silu(gate(x)) * up(x))` (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.up = linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.down = linear(config.d_ff, config.d_model, bias=config.mlp_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class GeluMlp(nn.Module):
    """`down(gelu(up(x)))`, the plain MLP of GPT-2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.down = linear(config.d_ff, config.d_model, bias=config.mlp_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BTD), approximate="tanh"))


def mlp(config: ModelConfig) -> nn.Module:
    """The MLP that `config.mlp` names."""
    return {"swiglu": SwigluMlp, "gelu": GeluMlp}[config.mlp](config)
