"""A model whose Blocks read only what is kept of their inputs.

Tokens being decoded are sparse, those of prompts are dense: `SparseRows` says which are which in each forward pass. The
router of a mixture of experts always reads all of its input.

Shapes: B batch, T tokens, N = B x T and in attention heads, K key-value heads, H head dim, S slots of experts,
D model, F hidden.
"""

from typing import Any

import torch
from torch import Tensor, nn

from raygrow.nn.attention import Attend, Attention
from raygrow.nn.mlp import SwigluMlp
from raygrow.nn.moe import Moe
from raygrow.nn.rack import Rack
from raygrow.nn.rope import rotate
from raygrow.sparsity.inputs import Place
from raygrow.sparsity.linear import SparseLinear, SparseRows
from raygrow.sparsity.methods import WEIGHTED, Method, Selector, column_norms
from raygrow.sparsity.plan import SparsityPlan


def sparse(model: Rack, plan: SparsityPlan, sparsity: float, *, rows: SparseRows | None = None) -> Rack:
    """Makes a model sparse, in place.

    Args:
        model: Of the folder that the plan lies in, on the device and in the dtype that it runs in.
        plan: From that folder.
        sparsity: One of the plan's levels.
        rows: Which tokens are sparse, to be changed from one forward pass to the next; all when not given.

    Returns:
        The same model.

    Raises:
        ValueError: If the plan has no such level.
    """
    level = plan.level(sparsity)
    for place, selector in install(model, plan.method, rows or SparseRows()).items():
        selector.choice = level.choices[place]
    return model


def install(model: Rack, method: Method, rows: SparseRows) -> dict[Place, Selector]:
    """Puts sparse modules in the place of a model's own, a Block at a time.

    Returns:
        The selectors of all inputs, which keep everything as yet.
    """
    weighted = method in WEIGHTED
    selectors: dict[Place, Selector] = {}
    block: Any
    for index, block in enumerate(model.blocks):
        block.attention = attention = SparseAttention(block.attention, rows, weighted=weighted)
        kind: Any = SparseMoe if isinstance(block.mlp, Moe) else SparseMlp
        block.mlp = mlp = kind(block.mlp, rows, weighted=weighted)
        selectors[index, "attention"] = attention.qkv.selector
        selectors[index, "o"] = attention.o.selector
        selectors[index, "mlp"], selectors[index, "down"] = mlp.selectors
    return selectors


class SparseAttention(nn.Module):
    """`Attention` with q, k and v as one projection."""

    def __init__(self, attention: Attention, rows: SparseRows, *, weighted: bool) -> None:
        super().__init__()
        self.head_dim = attention.head_dim
        self.qkv = SparseLinear([attention.q, attention.k, attention.v], rows, weighted=weighted)
        self.o = SparseLinear([attention.o], rows, weighted=weighted)
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        q_BTNH, k_BTKH, v_BTKH = (y.unflatten(-1, (-1, self.head_dim)) for y in self.qkv(x_BTD))
        q_BTNH = rotate(self.q_norm(q_BTNH), *rope)
        k_BTKH = rotate(self.k_norm(k_BTKH), *rope)
        return self.o(attend(q_BTNH, k_BTKH, v_BTKH).flatten(2))[0]


class SparseMlp(nn.Module):
    """An MLP with gate and up as one projection."""

    def __init__(self, mlp: Any, rows: SparseRows, *, weighted: bool) -> None:
        super().__init__()
        self.activate = mlp.activate
        self.up = SparseLinear(_readers(mlp), rows, weighted=weighted)
        self.down = SparseLinear([mlp.down], rows, weighted=weighted)
        self.selectors = self.up.selector, self.down.selector

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(self.activate(*self.up(x_BTD)))[0]


class SparseMoe(nn.Module):
    """A mixture of experts that share what is kept of their input; of what `down` reads each keeps its own."""

    def __init__(self, moe: Moe, rows: SparseRows, *, weighted: bool) -> None:
        super().__init__()
        self.moe, self.rows = moe, rows
        experts: Any = moe.experts
        self.selectors = tuple(
            Selector(len(weight_DEF), column_norms(weight_DEF.flatten(1)) if weighted else None)
            for weight_DEF in (
                torch.cat([p.weight.detach() for p in _readers(experts)], dim=1).permute(2, 0, 1),
                experts.down.weight.detach().permute(2, 0, 1),
            )
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        of_x, of_hidden = self.selectors
        experts: Any = self.moe.experts
        routes = self.moe.route(x_BTD)
        sparse_BT = torch.zeros(x_BTD.shape[:2], dtype=torch.bool, device=x_BTD.device)
        sparse_BT[:, self.rows.within(x_BTD.shape[1])] = True
        sparse_N1 = sparse_BT.flatten()[:, None]
        x_ND = x_BTD.flatten(0, 1).contiguous()
        x_SD = torch.where(sparse_N1, of_x.masked(x_ND), x_ND)[routes.tokens_S]
        hidden_SF = experts.activate(*(project(x_SD, routes.offsets_E) for project in _readers(experts)))
        hidden_SF = torch.where(sparse_N1[routes.tokens_S], of_hidden.masked(hidden_SF), hidden_SF)
        y_ND = routes.combine(experts.down(hidden_SF, routes.offsets_E))
        return y_ND.to(x_BTD.dtype).view_as(x_BTD)


def _readers(mlp: Any) -> list:
    """The projections that read an MLP's input, in the order that its activation takes them."""
    return [mlp.gate, mlp.up] if isinstance(mlp, SwigluMlp) else [mlp.up]
