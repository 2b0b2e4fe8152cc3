"""The Triton kernel behind `kernels/zeros.py`: the units that a gate lets through, and no others.

A program has a few units and goes through all of what they read. Whether a unit is needed is in the gates, which are
there before: nothing is counted, listed or waited for, and the grid is always the same.

Shapes: R rows, D input, F units.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16
"""At most: what a tensor core multiplies at a time."""


@triton.jit(do_not_specialize=["rows"])
def _rectified_products(
    gate, x, weight, bias, out, rows, units,
    D: tl.constexpr, ALONE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    f, d = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_D)
    real_f = f < units
    r = tl.arange(0, BLOCK_R)
    real_rf = (r < rows)[:, None] & real_f[None, :]
    where_rf = r[:, None] * units + f[None, :]
    gate_rf = tl.load(gate + where_rf, mask=real_rf, other=0.0).to(tl.float32)
    shut_rf = gate_rf <= 0.0  # what is no number is not shut
    needed_f = tl.min(shut_rf.to(tl.int32), 0) == 0
    sum_rf = tl.zeros([BLOCK_R, BLOCK_F], tl.float32)
    if tl.max(needed_f.to(tl.int32), 0) > 0:
        weight_f = weight + f.to(tl.int64) * D
        if ALONE:
            sum_fd = tl.zeros([BLOCK_F, BLOCK_D], tl.float32)
            for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
                real_d = start + d < D
                x_d = tl.load(x + start + d, mask=real_d, other=0.0).to(tl.float32)
                w_fd = tl.load(
                    weight_f[:, None] + (start + d)[None, :], mask=needed_f[:, None] & real_d[None, :], other=0.0
                )
                sum_fd += w_fd.to(tl.float32) * x_d[None, :]
            sum_rf = tl.sum(sum_fd, 1)[None, :]
        else:
            for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
                real_d = start + d < D
                x_rd = tl.load(
                    x + r[:, None] * D + (start + d)[None, :], mask=(r < rows)[:, None] & real_d[None, :], other=0.0
                )
                w_df = tl.load(
                    weight_f[None, :] + (start + d)[:, None], mask=needed_f[None, :] & real_d[:, None], other=0.0
                )
                sum_rf = tl.dot(x_rd, w_df, sum_rf, input_precision="ieee")
        if bias is not None:
            sum_rf += tl.load(bias + f, mask=real_f, other=0.0).to(tl.float32)[None, :]
    tl.store(out + where_rf, tl.where(shut_rf, 0.0, gate_rf * sum_rf).to(out.dtype.element_ty), mask=real_rf)


def rectified_linear_triton(
    gate_RF: Tensor, x_RD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None, *, tiling: tuple | None = None
) -> Tensor:
    """Same contract as `rectified_linear`, of at most 16 rows.

    Args:
        gate_RF: Gates.
        x_RD: Rows.
        weight_FD: A row for each unit.
        bias_F: Of the units.
        tiling: Units and inputs that a program has at a time, its warps and stages.
    """
    rows, units = gate_RF.shape
    assert rows <= ROWS, f"{rows} rows: at most {ROWS} share a product"
    for tensor in (gate_RF, x_RD, weight_FD):
        assert tensor.is_contiguous(), "all that a product takes must be contiguous"
    hidden_RF = torch.empty_like(gate_RF)
    if not rows:
        return hidden_RF
    alone = rows == 1
    block_f, block_d, warps, stages = tiling or ((8, 512, 4, 3) if alone else (16, 256, 4, 3))
    _rectified_products[(triton.cdiv(units, block_f),)](
        gate_RF, x_RD, weight_FD, bias_F, hidden_RF, rows, units,
        D=x_RD.shape[1], ALONE=alone, BLOCK_R=1 if alone else ROWS, BLOCK_F=block_f, BLOCK_D=block_d, STAGES=stages,
        num_warps=warps,
    )  # fmt: skip
    return hidden_RF
