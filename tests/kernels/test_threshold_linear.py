"""The twin against its definition in fp64, the Triton kernel against the same.

Shapes: D input, F output.
"""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raygrow.kernels.row_linear import Around
from raygrow.kernels.threshold_linear import threshold_expert_linear, threshold_linear
from tests.kernels.test_row_linear import AROUND, SIZES, case, reference, relative_error

SCALED = pytest.mark.parametrize("scaled", [False, True])


class Case(NamedTuple):
    """Arguments of `threshold_linear`, and what is right."""

    x_1D: Tensor
    weight_DF: Tensor
    threshold: float
    scale_D: Tensor | None
    around: Around
    true_1F: Tensor

    @property
    def found(self) -> Tensor:
        return threshold_linear(*self[:-1])


def threshold_case(size: tuple[int, int], around: str, scaled: bool, dtype: torch.dtype, device: str) -> Case:
    """Half of the entries far above the threshold, half far below; what those are multiplied by is not a number."""
    x_1D, weight_FD, of_case = case(size, around, dtype, "cpu")
    generator = torch.Generator().manual_seed(1)
    large_D = torch.rand(size[0], generator=generator) < 0.5
    large_D[0] = True
    x_1D = x_1D.sign() * torch.where(large_D, 2 + x_1D.abs(), 0.02 * x_1D.abs()).to(dtype)
    if of_case.gain_D is not None:
        of_case = of_case._replace(gain_D=1 + 0.1 * of_case.gain_D.clamp(-2, 2))
    scale_D = 0.8 + 0.4 * torch.rand(size[0], generator=generator) if scaled else None
    # the norm is of all entries, the product of the large ones
    true_1F = reference(x_1D, torch.where(large_D, weight_FD, 0), of_case)
    weight_DF = torch.where(large_D, weight_FD, torch.nan).T.contiguous()
    placed = Around(*(value.to(device) if isinstance(value, Tensor) else value for value in of_case))
    scale_D = None if scale_D is None else scale_D.to(device)
    return Case(x_1D.to(device), weight_DF.to(device), 0.3, scale_D, placed, true_1F.to(device))


@SCALED
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_twin_is_its_definition(around: str, scaled: bool, dtype: torch.dtype, tolerance: float) -> None:
    given = threshold_case((1000, 300), around, scaled, dtype, "cpu")
    assert relative_error(given.found, given.true_1F) < tolerance


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@SCALED
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_kernel_is_its_definition(
    size: tuple[int, int], around: str, scaled: bool, dtype: torch.dtype, tolerance: float
) -> None:
    given = threshold_case(size, around, scaled, dtype, "cuda")
    assert given.found.dtype == dtype
    assert given.found.shape == (1, size[1])
    assert relative_error(given.found, given.true_1F) < tolerance
    assert torch.equal(given.found, given.found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_is_not_a_number_exceeds_every_threshold() -> None:
    x_1D, weight_DF = torch.zeros(1, 64, device="cuda"), torch.ones(64, 32, device="cuda")
    x_1D[0, 3] = torch.nan
    assert threshold_linear(x_1D, weight_DF, 10.0, None, Around()).isnan().all()


def expert_case(scaled: str, gated: bool, dtype: torch.dtype, device: str) -> tuple[tuple[Any, ...], Tensor]:
    """Arguments of `threshold_expert_linear`, and what is right; what no row of an expert keeps is not a number."""
    generator = torch.Generator().manual_seed(2)
    x_RD = torch.randn(4, 200, generator=generator, dtype=torch.float64)
    x_RD[3] = 0.01  # keeps nothing
    weight_EDF = torch.randn(3, 200, 96, generator=generator, dtype=torch.float64)
    bias_EF = None if gated else torch.randn(3, 96, generator=generator, dtype=torch.float64)
    expert_R = torch.tensor([2, 0, 2, 1])
    sizes = {"none": None, "shared": (200,), "own": (4, 200)}[scaled]
    scale = None if sizes is None else 0.5 + torch.rand(sizes, generator=generator)
    x_RD = x_RD.to(dtype)
    kept_RD = torch.where(x_RD.abs() * (1 if scale is None else scale) > 0.7, x_RD, 0)
    for expert in range(3):
        weight_EDF[expert, (kept_RD[expert_R == expert] == 0).all(0)] = torch.nan
    weight_EDF = weight_EDF.to(dtype)
    rows = []
    for kept_D, expert in zip(kept_RD.double(), expert_R.tolist(), strict=True):
        y_1F = kept_D[None] @ weight_EDF[expert].double().nan_to_num()
        y_1F = y_1F if bias_EF is None else y_1F + bias_EF[expert].to(dtype)
        rows.append(F.silu(y_1F[:, :48]) * y_1F[:, 48:] if gated else y_1F)
    given = (x_RD, weight_EDF, expert_R, 0.7, scale, None if bias_EF is None else bias_EF.to(dtype))
    return tuple(a.to(device) if isinstance(a, Tensor) else a for a in given), torch.cat(rows).to(device)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("scaled", ["none", "shared", "own"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_each_row_reads_what_it_keeps_of_its_expert(
    scaled: str, gated: bool, dtype: torch.dtype, tolerance: float
) -> None:
    given, true_RF = expert_case(scaled, gated, dtype, "cpu")
    found_RF = threshold_expert_linear(*given, gated=gated)
    assert found_RF.dtype == dtype
    assert relative_error(found_RF, true_RF) < tolerance


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("scaled", ["none", "shared", "own"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_kernel_reads_what_each_row_keeps_of_its_expert(
    scaled: str, gated: bool, dtype: torch.dtype, tolerance: float
) -> None:
    given, true_RF = expert_case(scaled, gated, dtype, "cuda")
    assert relative_error(threshold_expert_linear(*given, gated=gated), true_RF) < tolerance
