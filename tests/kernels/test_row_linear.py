"""The twin against its definition in fp64, the Triton kernel against the same.

Shapes: D input, F output.
"""

import pytest
import torch
from torch import Tensor

from raygrow.kernels.row_linear import Around, row_linear

SIZES = [(64, 48), (96, 1), (1000, 300), (2048, 2048), (4096, 9000)]
"""Input and output."""
AROUND = ["nothing", "norm", "norm and gain", "gated", "addend", "bias", "norm and bias", "norm, gated, addend"]


def case(size: tuple[int, int], around: str, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Around]:
    """A row, a weight, and what a description says is around their product."""
    generator = torch.Generator().manual_seed(sum(size))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    entries, features = size
    gated = "gated" in around
    return (
        random(1, entries),
        random(2 * features if gated else features, entries) * entries**-0.5,
        Around(
            eps=1e-5 if "norm" in around else None,
            gain_D=random(entries) if "gain" in around else None,
            bias_F=random(features) if "bias" in around else None,
            gated=gated,
            addend_RF=random(1, features) if "addend" in around else None,
        ),
    )


def reference(x_1D: Tensor, weight_FD: Tensor, around: Around) -> Tensor:
    """The definition, in fp64."""
    x_1D, weight_FD = x_1D.double(), weight_FD.double()
    if around.eps is not None:
        x_1D = x_1D / (x_1D.square().mean() + around.eps).sqrt()
    if around.gain_D is not None:
        x_1D = x_1D * around.gain_D.double()
    y_1F = x_1D @ weight_FD.T
    if around.bias_F is not None:
        y_1F = y_1F + around.bias_F.double()
    if around.gated:
        gate_1F, up_1F = y_1F.chunk(2, 1)
        y_1F = gate_1F * gate_1F.sigmoid() * up_1F
    return y_1F if around.addend_RF is None else y_1F + around.addend_RF.double()


def relative_error(found: Tensor, true: Tensor) -> float:
    return ((found.double() - true).norm() / true.norm()).item()


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_twin_is_its_definition(around: str, dtype: torch.dtype, tolerance: float) -> None:
    x_1D, weight_FD, of_case = case((1000, 300), around, dtype, "cpu")
    assert relative_error(row_linear(x_1D, weight_FD, of_case), reference(x_1D, weight_FD, of_case)) < tolerance


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_kernel_is_its_definition(size: tuple[int, int], around: str, dtype: torch.dtype, tolerance: float) -> None:
    x_1D, weight_FD, of_case = case(size, around, dtype, "cuda")
    found_1F = row_linear(x_1D, weight_FD, of_case)
    assert found_1F.dtype == dtype
    assert found_1F.shape == (1, size[1])
    assert relative_error(found_1F, reference(x_1D, weight_FD, of_case)) < tolerance
    assert torch.equal(row_linear(x_1D, weight_FD, of_case), found_1F)
