"""Rotary position embedding (RoFormer, arXiv 2104.09864), in the half-split layout that Llama checkpoints use.

Shapes: B batch, T tokens, N heads, H head dim.
"""

import torch
from torch import Tensor


def rope_angles(positions_T: Tensor, *, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, each `(T, H)`, in fp32 (under bf16 training the Blocks get them in bf16).

    Computed on the fly: they are cheap beside one Block, and a model built on the meta device then holds no buffers.
    """
    exponent = torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.float32) / head_dim
    angles = torch.outer(positions_T.float(), 1.0 / theta**exponent)
    angles_TH = torch.cat((angles, angles), dim=-1)
    return angles_TH.cos(), angles_TH.sin()


def rotate(x_BTNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Rotates each head's vector by its position's angles; keeps the dtype."""
    first, second = x_BTNH.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x_BTNH * cos_TH[:, None] + turned * sin_TH[:, None]).to(x_BTNH.dtype)
