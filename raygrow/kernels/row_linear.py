"""A linear projection of one row, as decoding one sequence has them, with what stands around it in the same kernel.

`row_linear` picks the Triton kernel on CUDA and its torch twin elsewhere.
Shapes: R rows, D input, F output.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Around(NamedTuple):
    """What stands around a product: a norm before it; a bias, a gate and an addition after it."""

    eps: float | None = None
    """Of the RMS norm that rows get first; None for none."""
    gain_D: Tensor | None = None
    """Of that norm."""
    bias_F: Tensor | None = None
    gated: bool = False
    """Whether the weight's halves are a gate and what it is applied to: `silu(first) * second`. Not with a bias."""
    addend_RF: Tensor | None = None
    """Such as the residual stream."""


def row_linear(x_1D: Tensor, weight_FD: Tensor, around: Around) -> Tensor:
    """`x @ weight.T` of one row, at the speed of reading the weight.

    Args:
        x_1D: Contiguous.
        weight_FD: Contiguous.
        around: What stands around the product.

    Returns:
        `(1, F)`, or `(1, F / 2)` if gated, in the weight's dtype. Sums are in fp32 on CUDA.
    """
    if weight_FD.is_cuda and weight_FD.element_size() <= 4:
        from raygrow.kernels.triton_row_linear import row_linear_triton

        return row_linear_triton(x_1D, weight_FD, around)
    return rows_linear(x_1D, weight_FD, around)


def rows_linear(x_RD: Tensor, weight_FD: Tensor, around: Around) -> Tensor:
    """The torch twin of `row_linear`, of any number of rows."""
    if around.eps is not None:
        x_RD = F.rms_norm(x_RD, x_RD.shape[-1:], around.gain_D, around.eps)
    y_RF = F.linear(x_RD, weight_FD, around.bias_F)
    if around.gated:
        gate_RF, up_RF = y_RF.chunk(2, dim=-1)
        y_RF = F.silu(gate_RF) * up_RF
    return y_RF if around.addend_RF is None else around.addend_RF + y_RF
