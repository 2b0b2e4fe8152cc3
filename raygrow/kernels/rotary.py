"""Turning heads to their positions: rotary embedding (RoFormer, arXiv 2104.09864), in Llama's half-split layout.

Shapes: B batch, T tokens, N heads, H head dim.
"""

import torch
from torch import Tensor


def rotate(x_BTNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Rotates each head's vector by its position's angles; keeps the dtype."""
    first, second = x_BTNH.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x_BTNH * cos_TH[:, None] + turned * sin_TH[:, None]).to(x_BTNH.dtype)


def rotate_fused(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """`rotate` without a gradient, in one kernel on CUDA.

    Args:
        x_TNH: The heads of a token are contiguous.
        cos_TH: Of each token's position.
        sin_TH: Of each token's position.
    """
    if x_TNH.is_cuda and x_TNH.dtype != torch.float64:
        from raygrow.kernels.triton_rotary import rotate_triton

        return rotate_triton(x_TNH, cos_TH, sin_TH)
    return rotate(x_TNH, cos_TH, sin_TH)
