"""Triton kernels behind the selections of `kernels/sparse_linear.py`: one program finds a row's largest entries, or
drops those that exceed no threshold.

The bits of sizes sort as the sizes do, so the keep-th largest is found by search over bits: a round counts how many
entries reach two probes, which leaves a third of the range. The row stays in registers throughout. Then one running
sum gives all entries that stay their places, and as many of those that equal the smallest as are still wanted.

Shapes: R rows, D entries, K kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from raygrow.kernels.triton_launch import overlapping, overlaps

LARGEST = 2**15
"""Entries of a row: two counts are summed in the halves of 32 bits."""


@triton.jit
def _keys(score):
    """Sizes as integers of the same order, below the highest of 15 bits, or of fp32 of 31: some NaN have that one."""
    if score.dtype.primitive_bitwidth == 16:
        return tl.minimum(score.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF, 0x7FFE)
    else:
        return tl.minimum(score.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7FFFFFFE)


@triton.jit
def _normed(x_d, gain, d, real_d, eps, D: tl.constexpr):
    """A row's RMS norm, rounded to its type."""
    wide_d = x_d.to(tl.float32)
    wide_d = wide_d * tl.rsqrt(tl.sum(wide_d * wide_d, 0) / D + eps)
    if gain is not None:
        wide_d *= tl.load(gain + d, mask=real_d, other=0.0).to(tl.float32)
    return wide_d.to(x_d.dtype)


@triton.jit
def _kth_largest(key_D, keep, BITS: tl.constexpr):
    """The largest key that at least `keep` entries reach."""
    low, high = 0, (1 << (BITS - 1)) - 1 + (1 << (BITS - 1))  # all reach the one, none the other
    while high - low > 1:
        third = tl.maximum((high - low) // 3, 1)
        first = low + third
        second = tl.minimum(first + third, high)
        counts = tl.sum((key_D >= first).to(tl.int32) + ((key_D >= second).to(tl.int32) << 16), 0)
        reach_first, reach_second = counts & 0xFFFF, counts >> 16
        high = tl.where(reach_second >= keep, high, tl.where(reach_first >= keep, second, first))
        low = tl.where(reach_second >= keep, second, tl.where(reach_first >= keep, first, low))
    return low


@triton.jit(do_not_specialize=["keep"])
def _select(
    x, scale, gain, index, value, dense, keep, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    real_d = d < D
    x_d = tl.load(x + row * D + d, mask=real_d, other=0.0)
    if NORM:
        x_d = _normed(x_d, gain, d, real_d, eps, D)
    if scale is None:
        key_d = _keys(x_d)
    else:
        key_d = _keys(tl.abs(x_d.to(tl.float32)) * tl.load(scale + d, mask=real_d, other=0.0).to(tl.float32))
    # what is not of the row is below all that is
    key_d = tl.where(real_d, key_d, -1)
    BITS: tl.constexpr = 15 if scale is None and x.dtype.element_ty.primitive_bitwidth == 16 else 31
    smallest = 0  # which all reach
    if keep < D:
        smallest = _kth_largest(key_d, keep, BITS)

    larger_d = key_d > smallest
    equal_d = key_d == smallest
    counts_d = tl.cumsum(larger_d.to(tl.int32) + (equal_d.to(tl.int32) << 16), 0)
    wanted = keep - tl.sum(larger_d.to(tl.int32), 0)
    equals_d = counts_d >> 16
    kept_d = larger_d | (equal_d & (equals_d <= wanted))
    if index is not None:
        place_d = (counts_d & 0xFFFF) + tl.minimum(equals_d, wanted) - 1
        tl.store(index + row * keep + place_d, d, mask=kept_d)
        tl.store(value + row * keep + place_d, x_d, mask=kept_d)
    if dense is not None:
        tl.store(dense + row * D + d, tl.where(kept_d, x_d, 0.0), mask=real_d)


@triton.jit
def _above(
    x, scale, gain, out, threshold, eps, scale_stride, D: tl.constexpr, BLOCK_D: tl.constexpr, NORM: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    real_d = d < D
    x_d = tl.load(x + row * D + d, mask=real_d, other=0.0)
    if NORM:
        x_d = _normed(x_d, gain, d, real_d, eps, D)
    score_d = tl.abs(x_d.to(tl.float32))
    if scale is not None:
        score_d *= tl.load(scale + row * scale_stride + d, mask=real_d, other=0.0).to(tl.float32)
    tl.store(out + row * D + d, tl.where(score_d <= threshold, 0.0, x_d), mask=real_d)


def select_triton(
    x_RD: Tensor,
    keep: int,
    *,
    scale_D: Tensor | None = None,
    eps: float | None = None,
    gain_D: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as `select`, and with `eps` as `norm_select`.

    Args:
        x_RD: Rows.
        keep: How many entries.
        scale_D: Weighs the entries.
        eps: Of the RMS norm that the rows get first.
        gain_D: Of that norm.
    """
    rows = len(x_RD)
    index_RK = torch.empty(rows, keep, dtype=torch.int32, device=x_RD.device)
    value_RK = torch.empty(rows, keep, dtype=x_RD.dtype, device=x_RD.device)
    _launch(x_RD, keep, scale_D, eps, gain_D, index_RK, value_RK, None)
    return index_RK, value_RK


def masked_triton(
    x_RD: Tensor,
    keep: int,
    *,
    scale_D: Tensor | None = None,
    eps: float | None = None,
    gain_D: Tensor | None = None,
) -> Tensor:
    """Same contract as `masked`, and with `eps` as `norm_masked`. Arguments as of `select_triton`."""
    out_RD = torch.empty_like(x_RD)
    _launch(x_RD, keep, scale_D, eps, gain_D, None, None, out_RD)
    return out_RD


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


def _launch(
    x_RD: Tensor,
    keep: int,
    scale_D: Tensor | None,
    eps: float | None,
    gain_D: Tensor | None,
    index_RK: Tensor | None,
    value_RK: Tensor | None,
    out_RD: Tensor | None,
) -> None:
    rows, size = x_RD.shape
    assert x_RD.is_contiguous(), "rows must be contiguous"
    assert size < LARGEST, f"rows of {size} entries: at most {LARGEST - 1} fit"
    assert 1 <= keep <= size, f"keep {keep} of {size} entries"
    if not rows:
        return
    pdl = overlaps(x_RD.device)
    block = max(triton.next_power_of_2(size), 32)
    _select[(rows,)](
        x_RD, scale_D, gain_D, index_RK, value_RK, out_RD, keep, 0.0 if eps is None else eps,
        D=size, BLOCK_D=block, NORM=eps is not None, PDL=pdl,
        num_warps=min(max(block // 512, 1), 16), **overlapping(pdl),
    )  # fmt: skip
