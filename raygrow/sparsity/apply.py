"""A model whose Blocks read only what is kept of their inputs.

Tokens being decoded are sparse, those of prompts are dense: `SparseRows` says which are which in each forward pass. The
router of a mixture of experts always reads all of its input.

Modules here take the residual stream and give it back, norms and additions included: the kernels that select and
multiply do these too.

Shapes: B batch, T tokens, N heads, K key-value heads, H head dim, D model, F hidden.
"""

from typing import Any

from torch import Tensor, nn

from raygrow.nn.attention import Attend, Attention, Rope
from raygrow.nn.block import Block
from raygrow.nn.moe import Moe
from raygrow.nn.rack import Rack
from raygrow.sparsity.experts import SparseMoe, fusible, readers
from raygrow.sparsity.inputs import Place
from raygrow.sparsity.linear import SparseLinear, SparseRows
from raygrow.sparsity.methods import WEIGHTED, Method, Selector
from raygrow.sparsity.plan import SparsityPlan
from raygrow.sparsity.zeros import skip_zeros


def sparse(model: Rack, plan: SparsityPlan, sparsity: float, *, rows: SparseRows | None = None) -> Rack:
    """Makes a model sparse, in place.

    Args:
        model: Of the folder that the plan lies in, on the device and in the dtype that it runs in.
        plan: From that folder.
        sparsity: One of the plan's levels.
        rows: Which tokens are sparse, to be changed from one forward pass to the next; all when not given. Method
            `relu` leaves out what is zero anyway, of all tokens.

    Returns:
        The same model.

    Raises:
        ValueError: If the plan has no such level, or the model is sparse already.
    """
    level = plan.level(sparsity)
    if plan.method == "relu":
        return skip_zeros(model)
    for place, selector in install(model, plan.method, rows or SparseRows()).items():
        selector.choice = level.choices[place]
    return model


def install(model: Rack, method: Method, rows: SparseRows) -> dict[Place, Selector]:
    """Puts sparse Blocks in the place of a model's own, one at a time.

    Returns:
        The selectors of all inputs, which keep everything as yet.
    """
    weighted = method in WEIGHTED
    selectors: dict[Place, Selector] = {}
    index = 0
    for stack in model.stacks:
        for place in range(len(stack.blocks)):
            # the model's list and the Stack's both hold the Block, whose memory is to be free for the next one
            model.blocks[index] = stack.blocks[place] = block = SparseBlock(
                stack.blocks[place], rows, weighted=weighted
            )
            selectors[index, "attention"] = block.attention.qkv.selector
            selectors[index, "o"] = block.attention.o.selector
            selectors[index, "mlp"], selectors[index, "down"] = block.mlp.selectors
            index += 1
    return selectors


class SparseBlock(nn.Module):
    """`Block`, sparse."""

    def __init__(self, block: Any, rows: SparseRows, *, weighted: bool) -> None:
        super().__init__()
        if not isinstance(block, Block):
            raise ValueError("this model is sparse already: load it again for another level")
        self.attention = SparseAttention(block.attention, block.attention_norm, rows, weighted=weighted)
        kind: Any = SparseMoe if isinstance(block.mlp, Moe) else SparseMlp
        self.mlp = kind(block.mlp, block.mlp_norm, rows, weighted=weighted)
        self.adapter = block.adapter

    def forward(self, x_BTD: Tensor, rope: Rope, attend: Attend) -> tuple[Tensor, None, None]:
        """As `Block.forward`, without what training wants to know."""
        x_BTD = self.attention(x_BTD, rope, attend)
        return self.mlp(x_BTD, self.adapter(x_BTD)), None, None


class SparseAttention(nn.Module):
    """A norm, `Attention` with q, k and v as one projection, and the residual stream around both."""

    def __init__(self, attention: Attention, norm: nn.Module, rows: SparseRows, *, weighted: bool) -> None:
        super().__init__()
        self.head_dim = attention.head_dim
        self.qkv = SparseLinear([attention.q, attention.k, attention.v], rows, weighted=weighted, norm=norm)
        self.o = SparseLinear([attention.o], rows, weighted=weighted)
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm

    def forward(self, x_BTD: Tensor, rope: Rope, attend: Attend) -> Tensor:
        parts = self.qkv(x_BTD).split(self.qkv.sizes, dim=-1)
        q_BTNH, k_BTKH, v_BTKH = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        return self.o(attend(self.q_norm(q_BTNH), self.k_norm(k_BTKH), v_BTKH, rope).flatten(2), x_BTD)


class SparseMlp(nn.Module):
    """A norm, an MLP with gate and up as one projection, and what both are added to."""

    def __init__(self, mlp: Any, norm: nn.Module, rows: SparseRows, *, weighted: bool) -> None:
        super().__init__()
        self.activate = mlp.activate
        gated = fusible(mlp)
        self.up = SparseLinear(readers(mlp), rows, weighted=weighted, norm=norm, gated=gated)
        self.down = SparseLinear([mlp.down], rows, weighted=weighted)
        self.selectors = self.up.selector, self.down.selector

    def forward(self, x_BTD: Tensor, residual_BTD: Tensor) -> Tensor:
        hidden_BTF = self.up(x_BTD)
        if not self.up.gated:
            hidden_BTF = self.activate(*hidden_BTF.split(self.up.sizes, dim=-1))
        return self.down(hidden_BTF, residual_BTD)
