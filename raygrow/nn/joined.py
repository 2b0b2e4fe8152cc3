"""Blocks as they decode: projections of one input joined, with the norms before them and the additions after them.

One token alone then is five kernels a Block, each of which reads its weights as fast as the memory gives them.

Shapes: B batch, T tokens, N heads, K key-value heads, H head dim, R = B x T rows, D model or input, F hidden or output.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raygrow.kernels.row_linear import Around, row_linear, rows_linear
from raygrow.nn.attention import Attend, Attention, Rope
from raygrow.nn.linear import constant
from raygrow.nn.mlp import KINDS, fusible, readers
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
        self.weight_FD = constant(_joined([projection.weight for projection in projections]))
        self.register_parameter("bias_F", joined_bias(projections))

    def forward(self, x_BTD: Tensor, addend_BTF: Tensor | None = None) -> Tensor:
        """`(B, T, D)` to the outputs side by side, or what is gated, plus what is to be added."""
        addend_RF = None if addend_BTF is None else addend_BTF.flatten(0, 1)
        around = Around(bias_F=self.bias_F, gated=self.gated, addend_RF=addend_RF)
        x_RD, around = with_norm(self.norm, x_BTD.flatten(0, 1), around)
        product = row_linear if len(x_RD) == 1 else rows_linear
        return product(x_RD, self.weight_FD, around).unflatten(0, x_BTD.shape[:2])


def with_norm(norm: nn.Module | None, x_RD: Tensor, around: Around) -> tuple[Tensor, Around]:
    """A norm as a part of what stands around a product if it is an RMS norm, or else its output."""
    if isinstance(norm, nn.RMSNorm) and norm.eps is not None:
        return x_RD, around._replace(eps=norm.eps, gain_D=norm.weight)
    return x_RD if norm is None else norm(x_RD), around


def joined_bias(projections: Sequence[nn.Linear]) -> nn.Parameter | None:
    """The biases of all projections, if they have any."""
    biases = [projection.bias for projection in projections if projection.bias is not None]
    return constant(_joined(biases)) if biases else None


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


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


class WholeMlp(nn.Module):
    """A norm, what is no plain MLP and stays as it is (a mixture of experts, say), and what both are added to."""

    def __init__(self, mlp: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = norm, mlp

    def forward(self, x_BTD: Tensor, residual_BTD: Tensor) -> Tensor:
        out = self.mlp(self.norm(x_BTD))
        return residual_BTD + (out[0] if isinstance(out, tuple) else out)


class JoinedBlock(nn.Module):
    """`Block`, of parts that take the residual stream and give it back."""

    def __init__(self, attention: nn.Module, mlp: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.attention, self.mlp, self.adapter = attention, mlp, adapter

    def forward(self, x_BTD: Tensor, rope: Rope, attend: Attend) -> tuple[Tensor, None, None]:
        """As `Block.forward`, without what training wants to know."""
        x_BTD = self.attention(x_BTD, rope, attend)
        return self.mlp(x_BTD, self.adapter(x_BTD)), None, None


def join(model: Rack) -> Rack:
    """Joins the projections of all Blocks that are not joined yet, in place.

    The names of weights change: such a model neither trains nor is saved.
    """
    replace_blocks(model, lambda block: block if isinstance(block, JoinedBlock) else _joined_block(block))
    return model


def _joined_block(block: Any) -> JoinedBlock:
    attention = JoinedAttention(block.attention, block.attention_norm, JoinedLinear)
    plain = type(block.mlp) in KINDS.values()
    mlp = JoinedMlp(block.mlp, block.mlp_norm, JoinedLinear) if plain else WholeMlp(block.mlp, block.mlp_norm)
    return JoinedBlock(attention, mlp, block.adapter)


def replace_blocks(model: Rack, make: Callable[[Any], nn.Module]) -> None:
    """Puts other Blocks in the place of a model's own, one at a time."""
    index = 0
    for stack in model.stacks:
        for place in range(len(stack.blocks)):
            # the model's list and the Stack's both hold the Block, whose memory is to be free for the next one
            model.blocks[index] = stack.blocks[place] = make(stack.blocks[place])
            index += 1
            torch.cuda.empty_cache()  # in pieces too small for the next ones; nothing where there is no CUDA
