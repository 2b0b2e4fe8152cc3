"""One transformer layer: attention and MLP, each behind a norm and around a residual (pre-norm)."""

from torch import Tensor, nn

from raygrow.nn.attention import Attend, Attention
from raygrow.nn.config import ModelConfig
from raygrow.nn.mlp import mlp
from raygrow.nn.norm import norm


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`. Shapes: `(B, T, D)` in and out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = norm(config, config.d_model)
        self.attention = Attention(config)
        self.mlp_norm = norm(config, config.d_model)
        self.mlp = mlp(config)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rope, attend)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))
