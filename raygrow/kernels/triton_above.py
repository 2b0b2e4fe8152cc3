"""Triton kernel behind `above` and `norm_above` of `kernels/sparse_linear.py`: rows without what a threshold drops.

Shapes: R rows, D entries.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _above(
    x, scale, gain, out, threshold, eps, scale_stride, D: tl.constexpr, BLOCK_D: tl.constexpr, NORM: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    real_d = d < D
    x_d = tl.load(x + row * D + d, mask=real_d, other=0.0)
    if NORM:
        wide_d = x_d.to(tl.float32)
        wide_d = wide_d * tl.rsqrt(tl.sum(wide_d * wide_d, 0) / D + eps)
        if gain is not None:
            wide_d *= tl.load(gain + d, mask=real_d, other=0.0).to(tl.float32)
        x_d = wide_d.to(x.dtype.element_ty)
    score_d = tl.abs(x_d.to(tl.float32))
    if scale is not None:
        score_d *= tl.load(scale + row * scale_stride + d, mask=real_d, other=0.0).to(tl.float32)
    tl.store(out + row * D + d, tl.where(score_d <= threshold, 0.0, x_d), mask=real_d)


def above_triton(
    x_RD: Tensor,
    threshold: float,
    scale: Tensor | None = None,
    *,
    eps: float | None = None,
    gain_D: Tensor | None = None,
) -> Tensor:
    """Same contract as `above`, and with `eps` as `norm_above`."""
    assert x_RD.is_contiguous(), "rows must be contiguous"
    assert scale is None or scale.is_contiguous(), "scales must be contiguous"
    rows, size = x_RD.shape
    out_RD = torch.empty_like(x_RD)
    if rows:
        block = triton.next_power_of_2(size)
        _above[(rows,)](
            x_RD, scale, gain_D, out_RD, threshold, 0.0 if eps is None else eps,
            size if scale is not None and scale.dim() == 2 else 0,
            D=size, BLOCK_D=block, NORM=eps is not None, num_warps=min(max(block // 512, 1), 16),
        )  # fmt: skip
    return out_RD
