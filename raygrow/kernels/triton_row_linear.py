"""Triton kernel behind `kernels/row_linear.py`: one row times all of a weight, and what stands around it.

A program computes some features from all of the row, so nothing has to be put together afterwards: the norm's factor
too is known to each in the end. What is read next is on its way while what is there is summed; the faster the memory,
the more must be on its way.

Shapes: D input, F output, P packs of neighbouring entries.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from raygrow.kernels.row_linear import Around
from raygrow.kernels.triton_epilogue import finish, gate


class Tiling(NamedTuple):
    """How a product is cut up."""

    features: int
    """Of a program; gated, of each half."""
    entries: int
    """Of the row, at a time."""
    warps: int
    stages: int = 1
    """Pieces on their way to shared memory at a time; 1 where they go to registers."""


@triton.jit
def _folded(x_d, w_fd, PACK: tl.constexpr):
    """Products, those that one thread has beside each other summed: fewer sums to keep leaves room for more reads."""
    F: tl.constexpr = w_fd.shape[0]
    D: tl.constexpr = w_fd.shape[1]
    return tl.sum(tl.reshape(x_d[None, :] * w_fd.to(tl.float32), [F, D // PACK, PACK]), 2)


@triton.jit
def _row_linear(
    x, gain, weight, bias, addend, out, eps,
    D: tl.constexpr, F: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    f, d = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_D)
    real_f = f < F
    where_fd = weight + f.to(tl.int64)[:, None] * D + d[None, :]
    real_fd = real_f[:, None] & (d < D)[None, :]
    w_fd = tl.load(where_fd, mask=real_fd, other=0.0, eviction_policy="evict_first")
    PACK: tl.constexpr = 128 // weight.dtype.element_ty.primitive_bitwidth
    sum_fp = tl.zeros([BLOCK_F, BLOCK_D // PACK], tl.float32)
    squares_d = tl.zeros([BLOCK_D], tl.float32)
    if GATED:
        up_fd = tl.load(where_fd + F * D, mask=real_fd, other=0.0, eviction_policy="evict_first")
        up_sum_fp = tl.zeros([BLOCK_F, BLOCK_D // PACK], tl.float32)
    for start in range(0, D, BLOCK_D):
        x_d = tl.load(x + start + d, mask=start + d < D, other=0.0).to(tl.float32)
        next_fd = real_f[:, None] & (start + BLOCK_D + d < D)[None, :]
        next_w_fd = tl.load(where_fd + start + BLOCK_D, mask=next_fd, other=0.0, eviction_policy="evict_first")
        if NORM:
            squares_d += x_d * x_d
            if gain is not None:
                x_d *= tl.load(gain + start + d, mask=start + d < D, other=0.0).to(tl.float32)
        if GATED:
            next_up_fd = tl.load(
                where_fd + F * D + start + BLOCK_D, mask=next_fd, other=0.0, eviction_policy="evict_first"
            )
            up_sum_fp += _folded(x_d, up_fd, PACK)
            up_fd = next_up_fd
        sum_fp += _folded(x_d, w_fd, PACK)
        w_fd = next_w_fd

    factor = tl.rsqrt(tl.sum(squares_d, 0) / D + eps) if NORM else 1.0
    y_f = tl.sum(sum_fp, 1) * factor
    if GATED:
        y_f = gate(y_f, tl.sum(up_sum_fp, 1) * factor)
    finish(y_f, bias, addend, out, f, f, real_f)


def row_linear_triton(x_1D: Tensor, weight_FD: Tensor, around: Around, tiling: Tiling | None = None) -> Tensor:
    """Same contract as `row_linear`; `tiling` says how the work is cut up."""
    assert around.bias_F is None or not around.gated, "a gated product has no bias"
    for tensor in (x_1D, weight_FD, around.addend_RF):
        assert tensor is None or tensor.is_contiguous(), "all that a product takes must be contiguous"
    entries = weight_FD.shape[1]
    features = len(weight_FD) // 2 if around.gated else len(weight_FD)
    cut = tiling or tiling_of(features, entries, gated=around.gated)
    out_1F = torch.empty(1, features, dtype=weight_FD.dtype, device=weight_FD.device)
    _row_linear[(triton.cdiv(features, cut.features),)](
        x_1D, around.gain_D, weight_FD, around.bias_F, around.addend_RF, out_1F, around.eps or 0.0,
        D=entries, F=features, NORM=around.eps is not None, GATED=around.gated,
        BLOCK_F=cut.features, BLOCK_D=cut.entries, num_warps=cut.warps,
    )  # fmt: skip
    return out_1F


def tiling_of(features: int, entries: int, *, gated: bool) -> Tiling:
    """What was fastest, or within 2 % of it, for the products of Llamas of 1.4B and 6.7B on an H200."""
    if gated:
        return Tiling(4, 2048, 4)
    if features > 8192:
        return Tiling(32, 256, 4)
    return Tiling(8, 1024, 4) if features * entries >= 2**24 else Tiling(8, 2048, 8)
