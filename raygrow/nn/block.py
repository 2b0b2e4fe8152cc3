"""One transformer layer: attention and MLP, each behind a norm and around a residual (pre-norm)."""

from torch import Tensor, nn

from raygrow.nn.attention import Attend, Attention, Rope
from raygrow.nn.config import ModelConfig
from raygrow.nn.linear import linear
from raygrow.nn.mlp import Activity, mlp, watched
from raygrow.nn.moe import Balance, Moe
from raygrow.nn.norm import norm


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`, where the MLP may be a mixture of experts.

    In a model of rotation `block`, the MLP writes in the next Block's basis, and an adapter turns what it is added to:
    `adapter(x) + mlp(norm(x))` (as SliceGPT does between layers, arXiv 2401.15024).

    Args:
        config: The model.
        index: Which of its Blocks this one is.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = norm(config, config.d_model)
        self.attention = Attention(config)
        self.mlp_norm = norm(config, config.d_model)
        self.mlp = Moe(config) if config.has_experts(index) else mlp(config)
        self.adapter = linear(config.d_model, config.d_model) if config.has_adapter(index) else nn.Identity()

    def forward(self, x_BTD: Tensor, rope: Rope, attend: Attend) -> tuple[Tensor, Balance | None, Activity | None]:
        """`(B, T, D)` in and out; with experts how evenly they were used; of a kind of MLP that has zeros, where
        gradients are wanted, what hidden units did for each sequence, summed over its tokens.
        """
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rope, attend)
        balance, read_BTD = None, self.mlp_norm(x_BTD)
        if isinstance(self.mlp, Moe):
            out_BTD, balance, activity = self.mlp(read_BTD)
        else:
            out_BTD, activity = watched(self.mlp, read_BTD)
            activity = activity and Activity(*(part_BT.sum(1) for part_BT in activity))
        return self.adapter(x_BTD) + out_BTD, balance, activity
