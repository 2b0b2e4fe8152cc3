"""A run of Blocks: the unit that growth stacks and that progressive training trains."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from raygrow.nn.attention import Attend, Rope
from raygrow.nn.mlp import Activity
from raygrow.nn.moe import Balance


class Stack(nn.Module):
    """Blocks applied one after another. `attends` gives each Block the attention it is to use."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(
        self, x_BTD: Tensor, rope: Rope, attends: Sequence[Attend]
    ) -> tuple[Tensor, list[Balance], list[Activity]]:
        """`(B, T, D)` in and out, the Balance of each Block that has experts and the Activity of each that tells it."""
        balances, activities = [], []
        for block, attend in zip(self.blocks, attends, strict=True):
            x_BTD, balance, activity = block(x_BTD, rope, attend)
            if balance is not None:
                balances.append(balance)
            if activity is not None:
                activities.append(activity)
        return x_BTD, balances, activities
