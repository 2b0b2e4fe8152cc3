"""The Triton kernel against its torch twin, the twin against torch. Shapes: N tokens, V vocabulary."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raygrow.kernels.cross_entropy import IGNORE, cross_entropy_, cross_entropy_torch_

SIZES = [(1, 1), (1, 7), (5, 33), (64, 1000), (3, 8193)]


def random_case(rows: int, vocab: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * vocab)
    logits_NV = 3 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    targets_N = torch.randint(0, vocab, (rows,), generator=generator)
    targets_N[1::3] = IGNORE
    return logits_NV.to(device, dtype), targets_N.to(device)


def reference(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and the gradient of their sum, by autograd in fp64."""
    wide_NV = logits_NV.double().clone().requires_grad_()
    losses_N = F.cross_entropy(wide_NV, targets_N, reduction="none", ignore_index=IGNORE)
    losses_N.sum().backward()
    assert wide_NV.grad is not None
    return losses_N.detach(), wide_NV.grad


@pytest.mark.parametrize(("rows", "vocab"), SIZES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
def test_twin_is_torchs_cross_entropy(rows: int, vocab: int, dtype: torch.dtype, tolerance: float) -> None:
    logits_NV, targets_N = random_case(rows, vocab, dtype)
    losses_N, gradient_NV = reference(logits_NV, targets_N)

    found_N = cross_entropy_torch_(logits_NV, targets_N)

    assert found_N.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found_N.double(), losses_N, atol=min(tolerance, 1e-5), rtol=1e-5)
    torch.testing.assert_close(logits_NV.double(), gradient_NV, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_target_that_is_ignored_has_no_loss_and_no_gradient(dtype: torch.dtype) -> None:
    logits_NV, targets_N = random_case(4, 9, dtype)
    targets_N[:] = IGNORE
    assert not cross_entropy_(logits_NV, targets_N).any()
    assert not logits_NV.any()


def test_large_logits_do_not_overflow() -> None:
    logits_NV = torch.tensor([[1e4, 0.0, -1e4]])
    losses_N = cross_entropy_(logits_NV, torch.tensor([1]))
    torch.testing.assert_close(losses_N, torch.tensor([1e4]))
    torch.testing.assert_close(logits_NV, torch.tensor([[1.0, -1.0, 0.0]]))


def test_no_rows_give_no_losses() -> None:
    assert cross_entropy_(torch.empty(0, 5), torch.empty(0, dtype=torch.long)).shape == (0,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("rows", "vocab"), [*SIZES, (257, 32_768), (129, 50_257)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_kernel_is_its_twin(rows: int, vocab: int, dtype: torch.dtype, tolerance: float) -> None:
    from raygrow.kernels.triton_cross_entropy import cross_entropy_triton_

    logits_NV, targets_N = random_case(rows, vocab, dtype, "cuda")
    wide_NV = logits_NV.double()
    twin_N = cross_entropy_torch_(wide_NV, targets_N)

    found_N = cross_entropy_triton_(logits_NV, targets_N)

    def error(found: Tensor, true: Tensor) -> float:
        return ((found.double() - true).norm() / true.norm().clamp(min=1e-9)).item()

    assert error(found_N, twin_N) < 1e-5
    assert error(logits_NV, wide_NV) < tolerance
