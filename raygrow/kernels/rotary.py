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
