"""A linear projection of one row, as decoding one sequence has them, with what stands around it in the same kernel.

`row_linear` picks the Triton kernel on CUDA and its torch twin elsewhere.
Shapes: D input, F output.
"""

import torch.nn.functional as F
from torch import Tensor


def row_linear(
    x_1D: Tensor,
    weight_FD: Tensor,
    bias_F: Tensor | None = None,
    *,
    eps: float | None = None,
    gain_D: Tensor | None = None,
    addend_1F: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """`x @ weight.T`, at the speed of reading the weight.

    Args:
        x_1D: The row, contiguous.
        weight_FD: Contiguous.
        bias_F: Added.
        eps: Of the RMS norm that the row gets first; None for none.
        gain_D: Of that norm.
        addend_1F: Added too, such as the residual stream.
        gated: Whether the weight's halves are a gate and what it is applied to: `silu(first) * second` is the product.
            Not with a bias.

    Returns:
        `(1, F)`, or `(1, F / 2)` if gated, in the weight's dtype. Sums are in fp32 on CUDA.
    """
    assert bias_F is None or not gated, "a gated product has no bias"
    if weight_FD.is_cuda and weight_FD.element_size() <= 4:
        from raygrow.kernels.triton_row_linear import row_linear_triton

        rest = {"bias_F": bias_F, "eps": eps, "gain_D": gain_D, "addend_1F": addend_1F, "gated": gated}
        return row_linear_triton(x_1D, weight_FD, **rest)
    return row_linear_torch(x_1D, weight_FD, bias_F, eps=eps, gain_D=gain_D, addend_1F=addend_1F, gated=gated)


def row_linear_torch(
    x_1D: Tensor,
    weight_FD: Tensor,
    bias_F: Tensor | None = None,
    *,
    eps: float | None = None,
    gain_D: Tensor | None = None,
    addend_1F: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """The torch twin of `row_linear`, of any number of rows."""
    if eps is not None:
        x_1D = F.rms_norm(x_1D, x_1D.shape[-1:], gain_D, eps)
    y_1F = F.linear(x_1D, weight_FD, bias_F)
    if gated:
        gate_1F, up_1F = y_1F.chunk(2, dim=-1)
        y_1F = F.silu(gate_1F) * up_1F
    return y_1F if addend_1F is None else addend_1F + y_1F
