"""The twins against their definition, the Triton kernels against the twins.

Shapes: D entries, G groups, K kept, F output.
"""

import pytest
import torch
from torch import Tensor

from raygrow.kernels.group_select import (
    GROUP,
    Groups,
    Listed,
    group_kept,
    group_sizes,
    groups_of,
    list_groups,
    list_groups_torch,
)
from raygrow.kernels.list_linear import list_linear
from tests.kernels.test_row_linear import AROUND, case, reference, relative_error

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SIZES = [32, 100, 160, 4096]


def some_groups(size: int, device: str = "cpu", *, scaled: bool = True, gained: bool = False) -> Groups:
    """Each group keeps another number of its entries; where there are enough of them one none, one all."""
    generator = torch.Generator().manual_seed(size)
    sizes_G = torch.tensor(group_sizes(size))
    keep_G = (torch.rand(len(sizes_G), generator=generator) * (sizes_G + 1)).to(torch.int32).minimum(sizes_G)
    keep_G[0], keep_G[-1], keep_G[1:-1][:1] = GROUP, min(3, sizes_G[-1]), 0
    scale_D, gain_D = (torch.rand(size, generator=generator) + 0.5 for _ in range(2))
    groups = groups_of(keep_G.tolist(), torch.device(device), scale_D.to(device) if scaled else None)
    return groups._replace(gain_D=gain_D.to(device)) if gained else groups


def row(size: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Small whole numbers: many are equal."""
    return torch.randint(-9, 10, (1, size), generator=torch.Generator().manual_seed(1)).to(dtype).to(device)


def kept_by_definition(score_D: Tensor, keep_G: Tensor) -> list[int]:
    found = []
    for group, keep in enumerate(keep_G.tolist()):
        own = range(group * GROUP, min((group + 1) * GROUP, len(score_D)))
        found += sorted(sorted(own, key=lambda i: (-score_D[i].item(), i))[:keep])
    return found


@pytest.mark.parametrize("size", SIZES[:3])
def test_the_largest_of_each_group_are_kept_and_of_equals_the_first(size: int) -> None:
    groups, x_1D = some_groups(size, scaled=False), row(size, torch.float64)
    expected = kept_by_definition(x_1D[0].abs(), groups.keep_G)
    assert group_kept(x_1D.abs(), groups.keep_G)[0].nonzero()[:, 0].tolist() == expected
    listed = list_groups(x_1D, groups)
    assert listed.index_K.tolist() == expected
    assert len(expected) == groups.keep
    assert listed.value_K.tolist() == x_1D[0, expected].tolist()
    assert listed.squares_P.sum() == x_1D.square().sum()


def test_scores_have_scales_and_values_have_gains() -> None:
    groups, x_1D = some_groups(100, gained=True), torch.randn(1, 100, generator=torch.Generator().manual_seed(2))
    listed = list_groups(x_1D, groups)
    with_gains_1D = x_1D * groups.gain_D
    assert listed.index_K.tolist() == kept_by_definition((with_gains_1D.abs() * groups.scale_D)[0], groups.keep_G)
    assert torch.equal(listed.value_K, with_gains_1D[0, listed.index_K])
    torch.testing.assert_close(listed.squares_P.sum(), x_1D.square().sum())


def check_product(size: tuple[int, int], around: str, dtype: torch.dtype, device: str, tolerance: float) -> None:
    x_1D, weight_FD, of_case = case(size, around, dtype, device)
    groups = some_groups(size[0], device)
    listed = list_groups(x_1D, groups._replace(gain_D=of_case.gain_D))
    dropped_D = torch.ones(size[0], dtype=torch.bool, device=device)
    dropped_D[listed.index_K] = False
    # what is dropped counts in the norm alone
    true_1F = reference(x_1D, torch.where(dropped_D, 0, weight_FD), of_case)
    weight_DF = torch.where(dropped_D, torch.nan, weight_FD).T.contiguous()
    then = some_groups(size[1], device)
    around_without_gain = of_case._replace(gain_D=None)
    found_1F, kept = list_linear(listed, weight_DF, around_without_gain, then)
    assert found_1F.dtype == dtype
    assert relative_error(found_1F, true_1F) < tolerance
    assert kept is not None
    same(kept, list_groups_torch(found_1F, then))
    again_1F, none = list_linear(listed, weight_DF, around_without_gain)
    assert none is None
    assert torch.equal(again_1F, found_1F)


def same(found: Listed, expected: Listed) -> None:
    assert torch.equal(found.index_K, expected.index_K)
    assert torch.equal(found.value_K, expected.value_K)
    torch.testing.assert_close(found.squares_P.sum().double(), expected.squares_P.sum().double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_products_of_lists_are_their_definition(around: str, dtype: torch.dtype, tolerance: float) -> None:
    check_product((1000, 300), around, dtype, "cpu", tolerance)


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernel_lists_what_the_twin_lists(size: int, dtype: torch.dtype, gained: bool, scaled: bool) -> None:
    groups, x_1D = some_groups(size, "cuda", scaled=scaled, gained=gained), row(size, dtype, "cuda")
    same(list_groups(x_1D, groups), list_groups_torch(x_1D, groups))


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("size", [(64, 48), (96, 33), (1000, 300), (4096, 9000)], ids=str)
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_kernel_is_its_definition(size: tuple[int, int], around: str, dtype: torch.dtype, tolerance: float) -> None:
    check_product(size, around, dtype, "cuda", tolerance)


@pytest.mark.gpu
@NEEDS_CUDA
def test_what_is_no_number_stays_in_its_place() -> None:
    x_1D, groups = row(100, torch.float32, "cuda"), some_groups(100, "cuda")
    x_1D[0, 40:50] = torch.nan
    listed = list_groups(x_1D, groups)
    assert ((listed.index_K >= 0) & (listed.index_K < 100)).all()
    assert listed.value_K.isnan().any()
