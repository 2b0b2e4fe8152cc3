"""A model whose Blocks read only what is kept of their inputs.

Tokens being decoded are sparse, those of prompts are dense: `SparseRows` says which are which in each forward pass. The
router of a mixture of experts always reads all of its input.

Projections are joined as in `nn/joined.py`: the kernels that select and multiply do norms and additions too.

Shapes: B batch, T tokens, D model.
"""

from functools import partial
from typing import Any

from torch import nn

from raygrow.nn.block import Block
from raygrow.nn.joined import JoinedAttention, JoinedBlock, JoinedMlp, replace_blocks
from raygrow.nn.moe import Moe
from raygrow.nn.rack import Rack
from raygrow.sparsity.experts import SparseMoe
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

    Raises:
        ValueError: If the model is sparse already.
    """
    replace_blocks(model, partial(_sparse_block, rows=rows, weighted=method in WEIGHTED))
    _introduce(model)
    selectors: dict[Place, Selector] = {}
    block: Any
    for index, block in enumerate(model.blocks):
        selectors[index, "attention"] = block.attention.qkv.selector
        selectors[index, "o"] = block.attention.o.selector
        mlp = block.mlp
        of_mlp = mlp.selectors if isinstance(mlp, SparseMoe) else (mlp.up.selector, mlp.down.selector)
        selectors[index, "mlp"], selectors[index, "down"] = of_mlp
    return selectors


def _sparse_block(block: Any, *, rows: SparseRows, weighted: bool) -> JoinedBlock:
    if not isinstance(block, Block):
        raise ValueError("this model is sparse or joined already: load it again")
    make = partial(SparseLinear, rows=rows, weighted=weighted)
    mlp = (
        SparseMoe(block.mlp, block.mlp_norm, rows, weighted=weighted)
        if isinstance(block.mlp, Moe)
        else JoinedMlp(block.mlp, block.mlp_norm, make)
    )
    return JoinedBlock(JoinedAttention(block.attention, block.attention_norm, make), mlp, block.adapter)


def _introduce(model: Rack) -> None:
    """Tells projections whose output another one reads as it is, but for an RMS norm, which that is."""
    before: Any = None  # what has made the residual stream
    block: Any
    for block in model.blocks:
        attention, mlp = block.attention, block.mlp
        made_by = [(before, attention.qkv)]
        if isinstance(mlp, JoinedMlp):
            made_by += [(attention.o, mlp.up), (mlp.up if mlp.up.gated else None, mlp.down)]
        for maker, reader in made_by:
            if maker is not None and isinstance(reader.norm, nn.RMSNorm | None):
                maker.readers = (reader,)
        before = mlp.down if isinstance(mlp, JoinedMlp) else None
