"""The angles of rotary position embedding (RoFormer, arXiv 2104.09864). `kernels/rotary.py` turns heads by them.

Shapes: T tokens, H head dim.
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
