"""Triton kernel behind `rotate_fused` of `kernels/rotary.py`: a program turns some heads of one token.

Shapes: T tokens, N heads, H head dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate(
    x, cos, sin, out, token_stride,
    N: tl.constexpr, H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    n, h = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_H)
    real_nh = (n < N)[:, None] & (h < H)[None, :]
    half: tl.constexpr = H // 2
    from_n = x + token * token_stride + n[:, None] * H
    x_nh = tl.load(from_n + h[None, :], mask=real_nh, other=0.0).to(tl.float32)
    other_nh = tl.load(from_n + ((h + half) % H)[None, :], mask=real_nh, other=0.0).to(tl.float32)
    cos_h = tl.load(cos + token * H + h, mask=h < H, other=0.0).to(tl.float32)
    sin_h = tl.load(sin + token * H + h, mask=h < H, other=0.0).to(tl.float32)
    turned_nh = tl.where(h[None, :] < half, -other_nh, other_nh)
    y_nh = x_nh * cos_h[None, :] + turned_nh * sin_h[None, :]
    tl.store(out + token * N * H + n[:, None] * H + h[None, :], y_nh.to(out.dtype.element_ty), mask=real_nh)


def rotate_triton(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Same contract as `rotate_fused`."""
    tokens, heads, dim = x_TNH.shape
    assert x_TNH.stride()[1:] == (dim, 1), "the heads of a token must be contiguous"
    out_TNH = torch.empty(tokens, heads, dim, dtype=x_TNH.dtype, device=x_TNH.device)
    if tokens:
        block_n, block_h = min(triton.next_power_of_2(heads), 16), triton.next_power_of_2(dim)
        _rotate[(tokens, triton.cdiv(heads, block_n))](
            x_TNH, cos_TH.contiguous(), sin_TH.contiguous(), out_TNH, x_TNH.stride(0),
            N=heads, H=dim, BLOCK_N=block_n, BLOCK_H=block_h, num_warps=4,
        )  # fmt: skip
    return out_TNH
