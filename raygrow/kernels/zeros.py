"""Products around hidden units that are exactly zero: their weights need not be read, and what is computed is the same.

Which units a token uses is its own affair, so a few tokens together use more than one alone; but a unit that training
has made rare is rare for all of them. Each function picks its Triton kernels on CUDA for few rows, reads only what is
used on a CPU, and is the dense product for many rows.

Shapes: R rows (tokens), D model, F hidden units, U units that any row uses.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from raygrow.kernels.sparse_linear import masked_linear

FEW_ROWS = 8
"""Rows that are worth a look at what they use."""
USED_SHARE = 0.3
"""Of the units, on a CPU: of more, the dense product is faster than one of weights that are copied together first."""


def rectified_linear(gate_RF: Tensor, x_RD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """`relu(gate) * (x @ weight.T + bias)`; a unit whose gate is open for no row is not computed.

    Args:
        gate_RF: What the gate's projection gives, contiguous.
        x_RD: What both projections read, contiguous.
        weight_FD: A row for each unit, contiguous.
        bias_F: Of the units.

    Returns:
        `(R, F)`. Sums are in fp32 at least.
    """
    if len(gate_RF) > FEW_ROWS:
        return rectified_linear_dense(gate_RF, x_RD, weight_FD, bias_F)
    if _on_triton(weight_FD):
        from raygrow.kernels.triton_zeros import rectified_linear_triton

        return rectified_linear_triton(gate_RF, x_RD, weight_FD, bias_F)
    if weight_FD.is_cuda:  # a look at what is used would wait for the device
        return rectified_linear_dense(gate_RF, x_RD, weight_FD, bias_F)
    used_U = (gate_RF > 0).any(0).nonzero().flatten()
    if len(used_U) > USED_SHARE * len(weight_FD):
        return rectified_linear_dense(gate_RF, x_RD, weight_FD, bias_F)
    up_RU = F.linear(x_RD, weight_FD.index_select(0, used_U), None if bias_F is None else bias_F[used_U])
    return torch.zeros_like(gate_RF).index_copy_(1, used_U, gate_RF[:, used_U].relu() * up_RU)


def nonzero_linear(
    x_RF: Tensor, weight_FD: Tensor, bias_D: Tensor | None = None, *, addend_RD: Tensor | None = None
) -> Tensor:
    """`x @ weight` of rows that are mostly zeros; what is multiplied by zero in all of few rows is not read.

    Args:
        x_RF: Rows, contiguous.
        weight_FD: Input-major, contiguous.
        bias_D: Added.
        addend_RD: Added too, such as the residual stream.
    """
    if _on_triton(weight_FD) and len(x_RF) <= FEW_ROWS:
        from raygrow.kernels.triton_sparse_linear import nonzero_linear_triton, sparse_linear_triton

        if len(x_RF) == 1:
            return sparse_linear_triton(None, x_RF, weight_FD, bias_F=bias_D, addend_RF=addend_RD, skip_zeros=True)
        return nonzero_linear_triton(x_RF, weight_FD, bias_F=bias_D, addend_RF=addend_RD)
    return masked_linear(x_RF, weight_FD, bias_D, addend_RF=addend_RD)


def rectified_linear_dense(gate_RF: Tensor, x_RD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """The torch twin of `rectified_linear`, which reads everything."""
    return F.relu(gate_RF) * F.linear(x_RD, weight_FD, bias_F)


def _on_triton(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.dtype != torch.float64
