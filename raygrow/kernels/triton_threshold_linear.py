"""Triton kernel behind `kernels/threshold_linear.py`: a row times some rows of a weight, or of its expert's.

A program computes some features from all of the row, as in `triton_row_linear.py`, but from an input-major weight: what
a dropped entry saves lies in one piece. Whether an entry stays does not depend on the others, so nothing is searched
for or listed before the weight is read. Pieces are on their way to shared memory, several at a time: in registers what
is not read would leave holes, and too little would be on its way.

Shapes: R rows, D input, F output, E experts, K entries at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from raygrow.kernels.row_linear import Around
from raygrow.kernels.triton_epilogue import finish, folded, gate
from raygrow.kernels.triton_row_linear import Tiling


@triton.jit
def _entries(x, gain, scale, threshold, k, factor, D: tl.constexpr):
    """Entries of the row as they are multiplied, but for the norm's factor, and which score above the threshold."""
    real_k = k < D
    x_k = tl.load(x + k, mask=real_k, other=0.0).to(tl.float32)
    if gain is not None:
        x_k *= tl.load(gain + k, mask=real_k, other=0.0).to(tl.float32)
    score_k = tl.abs(x_k) * factor
    if scale is not None:
        score_k *= tl.load(scale + k, mask=real_k, other=0.0).to(tl.float32)
    return x_k, ((score_k > threshold) | (score_k != score_k)) & real_k  # what is not a number stays, and shows


@triton.jit
def _threshold_linear(
    x, gain, scale, weight, expert, bias, addend, out, threshold, eps, scale_stride,
    D: tl.constexpr, F: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr, WAVE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = 2 * F if GATED else F
    f, k = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_K)
    real_f, row = f < F, tl.program_id(1).to(tl.int64)
    x += row * D
    if scale is not None:
        scale += row * scale_stride
    if expert is not None:
        weight += tl.load(expert + row).to(tl.int64) * D * WIDTH
    factor = 1.0
    if NORM:
        d = tl.arange(0, BLOCK_D)
        x_d = tl.load(x + d, mask=d < D, other=0.0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(x_d * x_d, 0) / D + eps)
    sum_wf = tl.zeros([WAVE, BLOCK_F], tl.float32)
    if GATED:
        up_sum_wf = tl.zeros([WAVE, BLOCK_F], tl.float32)
    for start in tl.range(0, D, BLOCK_K, num_stages=STAGES):
        x_k, kept_k = _entries(x, gain, scale, threshold, start + k, factor, D)
        where_kf = weight + (start + k).to(tl.int64)[:, None] * WIDTH + f[None, :]
        kept_kf = kept_k[:, None] & real_f[None, :]
        sum_wf += folded(x_k, tl.load(where_kf, mask=kept_kf, other=0.0), WAVE)
        if GATED:
            up_sum_wf += folded(x_k, tl.load(where_kf + F, mask=kept_kf, other=0.0), WAVE)

    y_f = tl.sum(sum_wf, 0) * factor
    if GATED:
        y_f = gate(y_f, tl.sum(up_sum_wf, 0) * factor)
    finish(y_f, bias, addend, out, row * F + f, f, real_f)


def threshold_linear_triton(
    x_RD: Tensor,
    weight: Tensor,
    threshold: float,
    scale: Tensor | None,
    around: Around,
    *,
    expert_R: Tensor | None = None,
    tiling: Tiling | None = None,
) -> Tensor:
    """Same contract as `threshold_linear`, and with `(E, D, F)` and `expert_R` as `threshold_expert_linear`; `tiling`
    says how the work is cut up.
    """
    assert around.bias_F is None or not around.gated, "a gated product has no bias"
    for tensor in (x_RD, weight, scale, expert_R, around.addend_RF):
        assert tensor is None or tensor.is_contiguous(), "all that a product takes must be contiguous"
    rows, (entries, width) = len(x_RD), weight.shape[-2:]
    features = width // 2 if around.gated else width
    cut = tiling or tiling_of(features, weight.element_size(), gated=around.gated)
    out_RF = torch.empty(rows, features, dtype=weight.dtype, device=weight.device)
    _threshold_linear[(triton.cdiv(features, cut.features), rows)](
        x_RD, around.gain_D, scale, weight, expert_R, around.bias_F, around.addend_RF, out_RF,
        threshold, around.eps or 0.0, entries if scale is not None and scale.dim() == 2 else 0,
        D=entries, F=features, NORM=around.eps is not None, GATED=around.gated,
        BLOCK_D=triton.next_power_of_2(entries), BLOCK_K=cut.entries, BLOCK_F=cut.features,
        WAVE=cut.warps * 32 * 16 // weight.element_size() // cut.features, STAGES=cut.stages, num_warps=cut.warps,
    )  # fmt: skip
    return out_RF


def tiling_of(features: int, element_size: int, *, gated: bool) -> Tiling:
    """What keeps most bytes on their way, in less than 99 KiB of shared memory, which the smaller GPUs have."""
    stages = 12 // element_size
    if gated:
        return Tiling(64, 64, 4, stages)
    return Tiling(32, 256, 4, stages) if features <= 4096 else Tiling(64, 128, 4, min(stages, 4))
