"""A linear projection of one row that reads only the weights of listed entries, and lists what the next one reads.

`list_linear` picks the Triton kernel on CUDA and its torch twin elsewhere.
Shapes: D input, F output, K listed.
"""

import torch
from torch import Tensor

from raygrow.kernels.group_select import Groups, Listed, list_groups_torch
from raygrow.kernels.row_linear import Around
from raygrow.kernels.sparse_linear import finished, sparse_linear_torch


def list_linear(
    listed: Listed, weight_DF: Tensor, around: Around, then: Groups | None = None
) -> tuple[Tensor, Listed | None]:
    """`x @ weight` of the entries that a list names; no other row of the weight is read.

    Args:
        listed: Of a row that has its gains.
        weight_DF: Input-major, contiguous.
        around: What stands around the product. Its norm is of the whole row; gains are in the list already.
        then: What is to be kept of the output.

    Returns:
        `(1, F)`, or `(1, F / 2)` if gated, in the weight's dtype, and what is kept of it if that is asked for. Sums are
        in fp32 at least.
    """
    assert around.gain_D is None, "gains are in the list"
    if weight_DF.is_cuda and weight_DF.element_size() <= 4:
        from raygrow.kernels.triton_list_linear import list_linear_triton

        return list_linear_triton(listed, weight_DF, around, then)
    return list_linear_torch(listed, weight_DF, around, then)


def list_linear_torch(
    listed: Listed, weight_DF: Tensor, around: Around, then: Groups | None
) -> tuple[Tensor, Listed | None]:
    """The torch twin of the Triton kernel."""
    value_1K = listed.value_K[None]
    if around.eps is not None:
        factor = torch.rsqrt(listed.squares_P.sum() / len(weight_DF) + around.eps)
        value_1K = (value_1K * factor).to(value_1K.dtype)
    product_1F = sparse_linear_torch(listed.index_K[None], value_1K, weight_DF)
    y_1F = finished(product_1F, around.bias_F, around.addend_RF, around.gated)
    return y_1F, None if then is None else list_groups_torch(y_1F, then)
