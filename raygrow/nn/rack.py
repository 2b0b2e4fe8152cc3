"""The whole language model: embedding, Stacks of Blocks, final norm, output head.

Shapes: B batch, T tokens, D model, V vocabulary, L Blocks with experts, E experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raygrow.kernels.cross_entropy import IGNORE
from raygrow.nn.attention import Attend, default_attend
from raygrow.nn.block import Block
from raygrow.nn.config import ModelConfig
from raygrow.nn.linear import linear
from raygrow.nn.loss import Loss, linear_cross_entropy
from raygrow.nn.mlp import Activity
from raygrow.nn.moe import Balance
from raygrow.nn.norm import norm
from raygrow.nn.rope import rope_angles
from raygrow.nn.stack import Stack


class Rack(nn.Module):
    """A language model built from a `ModelConfig`.

    Blocks are registered once, in `blocks`, so that names stay flat (`blocks.7.attention.q.weight`); `stacks` groups
    the same Blocks without registering them again. A tied model has no `head`: it reads the embedding.

    Weights are whatever the device gives until `nn.init.init_weights` or a loaded checkpoint fills them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.n_blocks))
        self.norm = norm(config, config.d_model)
        self.head = None if config.tie_embeddings else linear(config.d_model, config.vocab_size)
        size = config.blocks_per_stack
        # a tuple, which torch.nn does not register: the Blocks above stay the only owners of the parameters
        self.stacks = tuple(Stack(self.blocks[i * size : (i + 1) * size]) for i in range(config.n_stacks))
        self.attend = default_attend(config)

    @property
    def head_weight(self) -> Tensor:
        """The `(V, D)` output matrix; the embedding's own when tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        *,
        positions_T: Tensor | None = None,
        attends: Sequence[Attend] | None = None,
        rows: Tensor | None = None,
    ) -> Tensor | Loss:
        """Logits `(B, T, V)`, or with `targets_BT` the summed losses.

        Args:
            tokens_BT: Token ids.
            targets_BT: The ids to predict; -100 is left out of the loss.
            positions_T: Position of each token; 0..T-1 when not given.
            attends: One attention function per Block; full attention when not given.
            rows: Compute the logits of these tokens only, indices into T: the head is a large part of the work.

        Returns:
            Logits, or a Loss.
        """
        if positions_T is None:
            positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        rope = rope_angles(positions_T, head_dim=self.config.head_dim, theta=self.config.rope_theta)
        attends = attends or [self.attend] * self.config.n_blocks
        x_BTD = self.embedding(tokens_BT)
        balances: list[Balance] = []
        activities: list[Activity] = []
        first = 0
        for stack in self.stacks:
            x_BTD, of_experts, of_units = stack(x_BTD, rope, attends[first : first + len(stack.blocks)])
            balances += of_experts
            activities += of_units
            first += len(stack.blocks)
        if rows is not None:
            x_BTD = x_BTD[:, rows]
        x_BTD = self.norm(x_BTD)
        if self.config.logit_scale != 1:
            x_BTD = x_BTD * self.config.logit_scale
        if targets_BT is None:
            return nn.functional.linear(x_BTD, self.head_weight)
        nats = linear_cross_entropy(x_BTD.flatten(0, 1), self.head_weight, targets_BT.flatten())
        loss = Loss(nats)
        # sequences that only fill up a batch have no targets, and must not move experts or hidden units either
        counted_B1 = (targets_BT != IGNORE).any(1, keepdim=True)
        if balances:
            losses_BL, loads_BLE = (torch.stack(parts, dim=1) for parts in zip(*balances, strict=True))
            loss = loss._replace(
                balance=(counted_B1 * losses_BL).sum(), load_LE=(counted_B1[..., None] * loads_BLE).sum(0)
            )
        if activities:
            sizes_BL, active_BL = (torch.stack(parts, dim=1) for parts in zip(*activities, strict=True))
            loss = loss._replace(
                activation=(counted_B1 * sizes_BL).sum() / len(activities),
                active=(counted_B1 * active_BL).sum() / len(activities),
            )
        return loss

    def fsdp_units(self) -> list[nn.Module]:
        """The modules to shard one by one, in the order they run: every Block, then the Rack with what is left."""
        return [*self.blocks, self]
