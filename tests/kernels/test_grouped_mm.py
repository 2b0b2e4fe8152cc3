"""The grouped product's twin against a product a row, torch's kernel against the twin.

Shapes: S rows, E experts, D input, F output.
"""

import logging

import pytest
import torch
from torch import Tensor

from raygrow.kernels.grouped_mm import _warn_once, grouped_mm, grouped_mm_twin

LOADS = {"even": [4, 4, 4], "uneven": [7, 1, 3, 2], "empty": [0, 5, 0, 0, 6, 0], "one": [0, 0, 9]}
Case = tuple[Tensor, Tensor, Tensor, Tensor]


def random_case(loads: list[int], d: int, f: int, dtype: torch.dtype, device: str = "cpu") -> Case:
    """Rows, matrices, offsets and biases."""
    generator = torch.Generator().manual_seed(sum(loads) * d * f)
    shapes = (sum(loads), d), (len(loads), f, d), (len(loads), f)
    x_SD, weight_EFD, bias_EF = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
        for shape in shapes
    )
    return x_SD, weight_EFD, torch.tensor(loads, device=device).cumsum(0, dtype=torch.int32), bias_EF


def gradients(out_SF: Tensor, *inputs: Tensor) -> list[Tensor]:
    """The output and the gradients of a random combination of its elements, in fp64."""
    direction_SF = torch.randn(out_SF.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = torch.autograd.grad(out_SF, inputs, direction_SF.to(out_SF.device, out_SF.dtype))
    return [tensor.detach().double().cpu() for tensor in (out_SF, *found)]


@pytest.mark.parametrize("loads", LOADS.values(), ids=LOADS.keys())
@pytest.mark.parametrize("with_bias", [True, False])
def test_twin_is_a_product_for_every_row(loads: list[int], with_bias: bool) -> None:
    x_SD, weight_EFD, offsets_E, bias_EF = random_case(loads, 6, 4, torch.float64)
    inputs = [x_SD, weight_EFD, bias_EF] if with_bias else [x_SD, weight_EFD]
    experts_S = torch.arange(len(loads)).repeat_interleave(torch.tensor(loads))
    expected_SF = torch.einsum("sd,sfd->sf", x_SD, weight_EFD[experts_S])
    if with_bias:
        expected_SF = expected_SF + bias_EF[experts_S]

    found_SF = grouped_mm(x_SD, weight_EFD, offsets_E, bias_EF if with_bias else None)

    for found, expected in zip(gradients(found_SF, *inputs), gradients(expected_SF, *inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_twin_is_a_sound_operator() -> None:
    # its fake, which torch.compile trusts, has the shapes, dtypes and strides of the real one
    x_SD, weight_EFD, offsets_E, bias_EF = random_case(LOADS["empty"], 6, 4, torch.float32)
    torch.library.opcheck(grouped_mm_twin, (x_SD, weight_EFD, offsets_E, bias_EF))
    torch.library.opcheck(grouped_mm_twin, (x_SD, weight_EFD, offsets_E, None))


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GPU_LOADS = [[128, 256, 0, 1], [0, 0, 513, 0, 7, 8], [4096, 3000, 5000, 1, 0, 4287]]


@pytest.mark.parametrize("loads", [pytest.param(loads, marks=gpu) for loads in GPU_LOADS])
@pytest.mark.parametrize("with_bias", [True, False])
def test_kernel_is_its_twin(loads: list[int], with_bias: bool) -> None:
    x_SD, weight_EFD, offsets_E, bias_EF = random_case(loads, 256, 512, torch.bfloat16, "cuda")
    # memory that is not zeros, for a kernel that leaves out the gradients of experts without rows
    torch.full((len(loads) * 256 * 512,), float("nan"), device="cuda", dtype=torch.bfloat16)
    inputs = [x_SD, weight_EFD, bias_EF] if with_bias else [x_SD, weight_EFD]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]

    found_SF = grouped_mm(x_SD, weight_EFD, offsets_E, bias_EF if with_bias else None)
    expected_SF = grouped_mm_twin(wide[0], wide[1], offsets_E, wide[2] if with_bias else None)

    assert "raygrow" not in found_SF.grad_fn.name().lower()
    found_gradients = gradients(found_SF, *inputs)
    for found, expected in zip(found_gradients, gradients(expected_SF, *wide), strict=True):
        assert (found - expected).norm() <= 5e-3 * expected.norm()
    assert not found_gradients[2][torch.tensor(loads) == 0].any()


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=gpu)])
def test_what_the_kernel_cannot_take_is_said_once(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    _warn_once.cache_clear()
    x_SD, weight_EFD, offsets_E, _ = random_case([3, 5], 16, 8, dtype, "cuda")
    with caplog.at_level(logging.WARNING, logger="raygrow"):
        for _ in range(2):
            grouped_mm(x_SD, weight_EFD, offsets_E)
    assert [record.getMessage() for record in caplog.records] == [
        "grouped products on CUDA are fast in bf16 with sizes that are multiples of 8: these, float32 of 8 x 16, "
        "run one expert after another"
    ]
