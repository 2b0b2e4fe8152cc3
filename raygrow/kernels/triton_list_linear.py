"""Triton kernel behind `kernels/list_linear.py`: one row times the listed rows of a weight.

A program computes some features from all of the list, so the output is there at once, and with it what the next product
keeps. What is read next is on its way while what is there is summed.

Shapes: D input, F output, K entries at a time, P parts of a sum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from raygrow.kernels.group_select import GROUP, Groups, Listed
from raygrow.kernels.row_linear import Around
from raygrow.kernels.triton_epilogue import finish, folded, gate
from raygrow.kernels.triton_group_select import empty_list, list_largest
from raygrow.kernels.triton_row_linear import Tiling


@triton.jit(do_not_specialize=["keep"])
def _list_linear(
    index, value, squares, weight, bias, addend, out, eps, keep, parts,
    then_keep, then_first, then_scale, then_gain, then_index, then_value, then_squares,
    D: tl.constexpr, F: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, THEN: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_P: tl.constexpr, WAVE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = 2 * F if GATED else F
    f, k = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_K)
    real_f, real_k = f < F, k < keep
    x_k = tl.load(value + k, mask=real_k, other=0.0).to(tl.float32)
    where_kf = weight + tl.load(index + k, mask=real_k, other=0).to(tl.int64)[:, None] * WIDTH + f[None, :]
    real_kf = real_k[:, None] & real_f[None, :]
    w_kf = tl.load(where_kf, mask=real_kf, other=0.0, eviction_policy="evict_first")
    sum_wf = tl.zeros([WAVE, BLOCK_F], tl.float32)
    if GATED:
        up_kf = tl.load(where_kf + F, mask=real_kf, other=0.0, eviction_policy="evict_first")
        up_sum_wf = tl.zeros([WAVE, BLOCK_F], tl.float32)
    # two pieces ahead which rows they are, one piece ahead the rows
    next_real_k = BLOCK_K + k < keep
    next_index_k = tl.load(index + BLOCK_K + k, mask=next_real_k, other=0)
    for start in range(BLOCK_K, keep + BLOCK_K, BLOCK_K):
        next_x_k = tl.load(value + start + k, mask=next_real_k, other=0.0).to(tl.float32)
        where_kf = weight + next_index_k.to(tl.int64)[:, None] * WIDTH + f[None, :]
        real_kf = next_real_k[:, None] & real_f[None, :]
        next_w_kf = tl.load(where_kf, mask=real_kf, other=0.0, eviction_policy="evict_first")
        if GATED:
            next_up_kf = tl.load(where_kf + F, mask=real_kf, other=0.0, eviction_policy="evict_first")
        next_real_k = start + BLOCK_K + k < keep
        next_index_k = tl.load(index + start + BLOCK_K + k, mask=next_real_k, other=0)
        if GATED:
            up_sum_wf += folded(x_k, up_kf, WAVE)
            up_kf = next_up_kf
        sum_wf += folded(x_k, w_kf, WAVE)
        x_k, w_kf = next_x_k, next_w_kf

    y_f = tl.sum(sum_wf, 0)
    if GATED:
        up_f = tl.sum(up_sum_wf, 0)
    if NORM:
        p = tl.arange(0, BLOCK_P)
        factor = tl.rsqrt(tl.sum(tl.load(squares + p, mask=p < parts, other=0.0), 0) / D + eps)
        y_f *= factor
        if GATED:
            up_f *= factor
    if GATED:
        y_f = gate(y_f, up_f)
    rounded_f = finish(y_f, bias, addend, out, f, f, real_f)
    if THEN:
        list_largest(
            rounded_f.to(tl.float32), f, real_f, then_keep, then_first, then_scale, then_gain,
            then_index, then_value, then_squares, tl.program_id(0), GROUP,
        )  # fmt: skip


def list_linear_triton(
    listed: Listed, weight_DF: Tensor, around: Around, then: Groups | None, tiling: Tiling | None = None
) -> tuple[Tensor, Listed | None]:
    """Same contract as `list_linear`; `tiling` says how the work is cut up, features in whole groups."""
    assert around.bias_F is None or not around.gated, "a gated product has no bias"
    assert weight_DF.is_contiguous(), "a weight must be contiguous"
    entries, width = weight_DF.shape
    features = width // 2 if around.gated else width
    cut = tiling or tiling_of(features, gated=around.gated)
    programs = triton.cdiv(features, cut.features)
    out_1F = torch.empty(1, features, dtype=weight_DF.dtype, device=weight_DF.device)
    kept = None if then is None else empty_list(then, out_1F.dtype, programs, out_1F.device)
    _list_linear[(programs,)](
        *listed, weight_DF, around.bias_F, around.addend_RF, out_1F, around.eps or 0.0,
        len(listed.index_K), len(listed.squares_P),
        *((None,) * 4 if then is None else (then.keep_G, then.first_G, then.scale_D, then.gain_D)),
        *((None,) * 3 if kept is None else kept),
        D=entries, F=features, NORM=around.eps is not None, GATED=around.gated, THEN=then is not None,
        BLOCK_K=cut.entries, BLOCK_F=cut.features, BLOCK_P=triton.next_power_of_2(len(listed.squares_P)),
        WAVE=cut.warps * 32 * 16 // weight_DF.element_size() // cut.features, GROUP=GROUP, num_warps=cut.warps,
    )  # fmt: skip
    return out_1F, kept


def tiling_of(features: int, *, gated: bool) -> Tiling:
    """What was fastest for the products of a Llama of 6.7B on an H200."""
    if gated:
        return Tiling(32, 128, 4)
    return Tiling(32, 1024, 8) if features <= 4096 else Tiling(32, 256, 8)
