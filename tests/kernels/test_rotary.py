"""Heads turned in one kernel are what they are in torch.

Shapes: T tokens, N heads, H head dim.
"""

import pytest
import torch

from raygrow.kernels.rotary import rotate, rotate_fused
from raygrow.nn.rope import rope_angles


def test_turning_keeps_lengths_and_knows_only_distances() -> None:
    x_TNH = torch.randn(1, 2, 8, dtype=torch.float64).expand(6, 2, 8).contiguous()
    angles = tuple(x.double() for x in rope_angles(torch.arange(6), head_dim=8, theta=100.0))
    turned_TNH = rotate_fused(x_TNH, *angles)
    torch.testing.assert_close(turned_TNH.norm(dim=-1), x_TNH.norm(dim=-1))
    products_TT = torch.einsum("tnh,snh->ts", turned_TNH, turned_TNH)
    torch.testing.assert_close(products_TT[:-2, :-2], products_TT[2:, 2:], atol=1e-6, rtol=1e-6)
    assert products_TT[0, 1] != pytest.approx(products_TT[0, 0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(1, 1, 4), (7, 3, 80), (300, 32, 128), (5, 20, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_is_torch(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    wide_TNH = torch.randn(shape[0], 2 * shape[1], shape[2], device="cuda").to(dtype)
    x_TNH = wide_TNH[:, : shape[1]]
    angles = rope_angles(torch.randint(5000, shape[:1], device="cuda"), head_dim=shape[2], theta=1e4)
    torch.testing.assert_close(rotate_fused(x_TNH, *angles), rotate(x_TNH, *angles))
