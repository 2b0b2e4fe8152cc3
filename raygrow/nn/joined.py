"""Blocks as they decode: projections of one input joined, with the norms before them and the additions after them.

One token alone then is five kernels a Block, each of which reads its weights as fast as the memory gives them.

Shapes: B batch, T tokens, N heads, K key-value heads, H head dim, D model or input, F hidden or output.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raygrow.kernels.row_linear import Around, row_linear, rows_linear
from raygrow.nn.attention import Attend, Attention, Rope
from raygrow.nn.block import Block
from raygrow.nn.mlp import SwigluMlp
from raygrow.nn.moe import Moe
from raygrow.nn.rack import Rack

MakeLinear = Callable[..., Any]
"""`make(projections, norm=None, gated=False)`: a module like `JoinedLinear`."""


class JoinedLinear(nn.Module):
    """Projections of one input, as one, with what stands around them.

    Args:
        projections: `nn.Linear`s of one input.
        norm: Of the input.
        gated: Whether the projections are a gate and what it is applied to: the output is `silu(first) * second`.
    """

    bias_F: nn.Parameter | None

    def __init__(self, projections: Sequence[nn.Linear], *, norm: nn.Module | None = None, gated: bool = False) -> None:
        super().__init__()
        self.sizes = [projection.out_features for projection in projections]
        self.norm, self.gated = norm, gated
        self.weight_FD = _constant(torch.cat([projection.weight.detach() for projection in projections]))
        biased = projections[0].bias is not None
        self.register_parameter(
            "bias_F", _constant(torch.cat([p.bias.detach() for p in projections])) if biased else None
        )

    def forward(self, x_BTD: Tensor, addend_BTF: Tensor | None = None) -> Tensor:
        """`(B, T, D)` to the outputs side by side, or what is gated, plus what is to be added."""
        x_RD, addend_RF = x_BTD.flatten(0, 1), None if addend_BTF is None else addend_BTF.flatten(0, 1)
        around = Around(bias_F=self.bias_F, gated=self.gated, addend_RF=addend_RF)
        if isinstance(self.norm, nn.RMSNorm) and self.norm.eps is not None:
            around = around._replace(eps=self.norm.eps, gain_D=self.norm.weight)
        elif self.norm is not None:
            x_RD = self.norm(x_RD)
        product = row_linear if len(x_RD) == 1 else rows_linear
        return product(x_RD, self.weight_FD, around).unflatten(0, x_BTD.shape[:2])


class JoinedAttention(nn.Module):
    """A norm, `Attention` with q, k and v as one projection, and the residual stream around both."""

    def __init__(self, attention: Attention, norm: nn.Module, make: MakeLinear) -> None:
        super().__init__()
        self.head_dim = attention.head_dim
        self.qkv = make([attention.q, attention.k, attention.v], norm=norm)
        self.o = make([attention.o])
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm

    def forward(self, x_BTD: Tensor, rope: Rope, attend: Attend) -> Tensor:
        parts = self.qkv(x_BTD).split(self.qkv.sizes, dim=-1)
        q_BTNH, k_BTKH, v_BTKH = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        return self.o(attend(self.q_norm(q_BTNH), self.k_norm(k_BTKH), v_BTKH, rope).flatten(2), x_BTD)


class JoinedMlp(nn.Module):
    """A norm, an MLP with gate and up as one projection, and what both are added to."""

    def __init__(self, mlp: Any, norm: nn.Module, make: MakeLinear) -> None:
        super().__init__()
        self.activate = mlp.activate
        self.up = make(readers(mlp), norm=norm, gated=fusible(mlp))
        self.down = make([mlp.down])

    def forward(self, x_BTD: Tensor, residual_BTD: Tensor) -> Tensor:
        hidden_BTF = self.up(x_BTD)
        if not self.up.gated:
            hidden_BTF = self.activate(*hidden_BTF.split(self.up.sizes, dim=-1))
        return self.down(hidden_BTF, residual_BTD)


class JoinedBlock(nn.Module):
    """`Block`, with its projections joined; a mixture of experts stays as it is."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.attention = JoinedAttention(block.attention, block.attention_norm, JoinedLinear)
        self.mlp = _Experts(block) if isinstance(block.mlp, Moe) else JoinedMlp(block.mlp, block.mlp_norm, JoinedLinear)
        self.adapter = block.adapter

    def forward(self, x_BTD: Tensor, rope: Rope, attend: Attend) -> tuple[Tensor, None, None]:
        """As `Block.forward`, without what training wants to know."""
        x_BTD = self.attention(x_BTD, rope, attend)
        return self.mlp(x_BTD, self.adapter(x_BTD)), None, None


class _Experts(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm, self.moe = block.mlp_norm, block.mlp

    def forward(self, x_BTD: Tensor, residual_BTD: Tensor) -> Tensor:
        return residual_BTD + self.moe(self.norm(x_BTD))[0]


def join(model: Rack) -> Rack:
    """Joins the projections of all Blocks, in place and one Block at a time; the model no longer trains."""
    replace_blocks(model, JoinedBlock)
    return model


def replace_blocks(model: Rack, make: Callable[[Any], nn.Module]) -> None:
    """Puts other Blocks in the place of a model's own, one at a time."""
    index = 0
    for stack in model.stacks:
        for place in range(len(stack.blocks)):
            # the model's list and the Stack's both hold the Block, whose memory is to be free for the next one
            model.blocks[index] = stack.blocks[place] = make(stack.blocks[place])
            index += 1


def readers(mlp: Any) -> list[Any]:
    """The projections that read an MLP's input, in the order that its activation takes them."""
    return [mlp.gate, mlp.up] if hasattr(mlp, "gate") else [mlp.up]


def fusible(mlp: Any) -> bool:
    """Whether the product's kernel can do the activation too: what reads the input is a SwiGLU without biases."""
    return type(mlp) is SwigluMlp and mlp.up.bias is None


def _constant(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
