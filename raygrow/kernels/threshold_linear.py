"""A linear projection of one row that reads only the weights of the entries which score above a threshold.

`threshold_linear` picks the Triton kernel on CUDA and its torch twin elsewhere.
Shapes: D input, F output.
"""

import torch.nn.functional as F
from torch import Tensor

from raygrow.kernels.row_linear import Around
from raygrow.kernels.sparse_linear import above, masked_linear


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
