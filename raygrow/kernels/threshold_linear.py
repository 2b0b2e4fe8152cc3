"""A linear projection of one row that reads only the weights of the entries which score above a threshold.

Both functions pick the Triton kernel on CUDA and its torch twin elsewhere.
Shapes: R rows, D input, F output, E experts.
"""

import torch.nn.functional as F
from torch import Tensor

from raygrow.kernels.row_linear import Around
from raygrow.kernels.sparse_linear import above, finished, masked_expert_linear_torch, masked_linear


def threshold_linear(
    x_1D: Tensor, weight_DF: Tensor, threshold: float, scale_D: Tensor | None, around: Around
) -> Tensor:
    """`x @ weight` of the entries whose `|x|`, or `|x| * scale`, exceeds a threshold; no other weight is read.

    Args:
        x_1D: Contiguous.
        weight_DF: Input-major, contiguous.
        threshold: Of all entries; a CUDA graph keeps it.
        scale_D: Factors on the magnitudes; None for none.
        around: What stands around the product. Scores are of what comes out of the norm.

    Returns:
        `(1, F)`, or `(1, F / 2)` if gated, in the weight's dtype. Sums are in fp32 at least.
    """
    if weight_DF.is_cuda and weight_DF.element_size() <= 4:
        from raygrow.kernels.triton_threshold_linear import threshold_linear_triton

        return threshold_linear_triton(x_1D, weight_DF, threshold, scale_D, around)
    if around.eps is not None:
        x_1D = F.rms_norm(x_1D, x_1D.shape[-1:], around.gain_D, around.eps)
    rest = {"addend_RF": around.addend_RF, "gated": around.gated}
    return masked_linear(above(x_1D, threshold, scale_D), weight_DF, around.bias_F, **rest)


def threshold_expert_linear(
    x_RD: Tensor,
    weight_EDF: Tensor,
    expert_R: Tensor,
    threshold: float,
    scale: Tensor | None,
    bias_EF: Tensor | None = None,
    *,
    gated: bool = False,
) -> Tensor:
    """`threshold_linear` of rows that each have their expert's weight and bias.

    Args:
        x_RD: Contiguous: a token that goes to several experts is several rows.
        weight_EDF: Input-major matrices of all experts, contiguous.
        expert_R: Whose weight each row takes, integers.
        threshold: Of all entries.
        scale: Factors on the magnitudes, `(D,)`, or `(R, D)` where each row has its own; None for none.
        bias_EF: Added; not together with `gated`.
        gated: Whether the weights' halves are a gate and what it is applied to.
    """
    if weight_EDF.is_cuda and weight_EDF.element_size() <= 4:
        from raygrow.kernels.triton_threshold_linear import threshold_linear_triton

        out_RF = threshold_linear_triton(x_RD, weight_EDF, threshold, scale, Around(gated=gated), expert_R=expert_R)
        return out_RF if bias_EF is None else out_RF + bias_EF[expert_R]
    out_RF = masked_expert_linear_torch(above(x_RD, threshold, scale), weight_EDF, expert_R)
    return finished(out_RF, None if bias_EF is None else bias_EF[expert_R], None, gated)
