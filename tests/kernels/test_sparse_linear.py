"""The twins against products in fp64 of what a plain sort selects, the Triton kernels against the twins.

Shapes: R rows, D input, K kept, F output, E experts.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raygrow.kernels import sparse_linear as kernels
from raygrow.kernels.sparse_linear import (
    Selection,
    above,
    above_torch,
    masked,
    masked_linear,
    norm_above,
    norm_masked,
    norm_select,
    scatter,
    select,
    select_torch,
    sparse_expert_linear,
    sparse_linear,
    sparse_linear_torch,
)

DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
SIZES = [1, 5, 64, 300, 1024]


def random_rows(rows: int, size: int, dtype: torch.dtype, *, ties: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    if ties:
        return torch.randint(-3, 4, (rows, size), generator=generator).to(dtype)
    return torch.randn(rows, size, generator=generator, dtype=torch.float64).to(dtype)


def keeps(size: int) -> list[int]:
    return sorted({1, max(size // 3, 1), max(size - 1, 1), size})


def sorted_selection(x_RD: Tensor, keep: int, scale_D: Tensor | None = None) -> Selection:
    """The first `keep` of a stable sort, row by row."""
    score_RD = x_RD.abs() if scale_D is None else x_RD.abs() * scale_D
    rows = [
        sorted(sorted(range(len(row)), key=lambda d: -row[d])[:keep])  # Python's sort keeps the order of equals
        for row in score_RD.tolist()
    ]
    index_RK = torch.tensor(rows, device=x_RD.device)
    return Selection(index_RK.to(torch.int32), x_RD.gather(1, index_RK))


def relative_error(found: Tensor, true: Tensor) -> float:
    return ((found.double() - true.double()).norm() / true.double().norm()).item()


def assert_same(found: Selection, true: Selection) -> None:
    assert found.index_RK.dtype == torch.int32
    assert torch.equal(found.index_RK, true.index_RK)
    assert torch.equal(found.value_RK, true.value_RK)


def product(x_RD: Tensor, weight_DF: Tensor, *, bias_F: Tensor | None, addend: Tensor | None, gated: bool) -> Tensor:
    """Written out in fp64."""
    y_RF = x_RD.double() @ weight_DF.double()
    if gated:
        gate_RF, up_RF = y_RF.chunk(2, 1)
        return gate_RF * gate_RF.sigmoid() * up_RF
    return y_RF + (0 if bias_F is None else bias_F.double()) + (0 if addend is None else addend.double())


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [dtype for dtype, _ in DTYPES], ids=str)
def test_the_largest_are_selected_and_of_equal_ones_the_first(dtype: torch.dtype, size: int, ties: bool) -> None:
    x_RD = random_rows(3, size, dtype, ties=ties)
    scale_D = random_rows(1, size, torch.float64)[0].abs().to(torch.promote_types(dtype, torch.float32))
    for keep in keeps(size):
        assert_same(select(x_RD, keep), sorted_selection(x_RD, keep))
        assert_same(select(x_RD, keep, scale_D), sorted_selection(x_RD, keep, scale_D))
        scale_RD = torch.stack([scale_D, scale_D.flip(0), scale_D.roll(1)])
        assert_same(select(x_RD, keep, scale_RD), sorted_selection(x_RD, keep, scale_RD))
        dense_RD = masked(x_RD, keep)
        assert torch.equal(dense_RD, scatter(sorted_selection(x_RD, keep), size))


def test_a_row_of_nan_keeps_as_many_as_any() -> None:
    x_RD = torch.full((2, 40), torch.nan, dtype=torch.bfloat16)
    x_RD[0, ::2] = 1.0
    index_RK, value_RK = select(x_RD, 20)
    assert torch.equal(index_RK[0], torch.arange(1, 40, 2, dtype=torch.int32))
    assert torch.equal(index_RK[1], torch.arange(20, dtype=torch.int32))
    assert value_RK.isnan().all()


def test_a_norm_comes_before_its_selection() -> None:
    x_RD, gain_D = random_rows(3, 64, torch.float32), random_rows(1, 64, torch.float32)[0]
    normed_RD = F.rms_norm(x_RD, (64,), gain_D, 1e-5)
    for scale_D in (None, torch.linspace(1, 3, 64)):
        assert_same(norm_select(x_RD, 20, 1e-5, gain_D, scale_D), select(normed_RD, 20, scale_D))
        assert torch.equal(norm_masked(x_RD, 20, 1e-5, gain_D, scale_D), masked(normed_RD, 20, scale_D))


def test_a_threshold_keeps_what_exceeds_it() -> None:
    x_RD = torch.tensor([[0.5, -2.0, 1.0, -1.0], [3.0, 0.0, -0.1, 1.1]])
    assert above(x_RD, 1.0).tolist() == [[0.0, -2.0, 0.0, 0.0], [3.0, 0.0, 0.0, pytest.approx(1.1)]]
    assert above(x_RD, 1.0, torch.tensor([3.0, 0.5, 1.0, 1.0])).tolist() == [
        [0.5, 0.0, 0.0, 0.0],
        [3.0, 0.0, 0.0, pytest.approx(1.1)],
    ]
    assert torch.equal(above(x_RD.bfloat16(), 1.0, torch.ones(4)), above(x_RD.bfloat16(), 1.0))


def test_a_threshold_is_not_rounded() -> None:
    x_RD = torch.tensor([[0.703125]], dtype=torch.bfloat16)  # what bf16 has nearest to 0.7012
    assert above(x_RD, 0.7012).item() == 0.703125
    assert above(x_RD, 0.7032).item() == 0


def test_what_is_not_a_number_exceeds_every_threshold() -> None:
    assert above(torch.tensor([[torch.nan, 0.5, 2.0]]), 1.0).isnan().tolist() == [[True, False, False]]


def test_a_norm_comes_before_its_threshold() -> None:
    x_RD, gain_D = random_rows(3, 64, torch.float32), random_rows(1, 64, torch.float32)[0]
    normed_RD = F.rms_norm(x_RD, (64,), gain_D, 1e-5)
    for scale_D in (None, torch.linspace(1, 3, 64)):
        found_RD = norm_above(x_RD, 0.8, 1e-5, gain_D, scale_D)
        assert torch.equal(found_RD, above(normed_RD, 0.8, scale_D))
        assert 0 < found_RD.count_nonzero() < found_RD.numel()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 5])
@pytest.mark.parametrize(("size", "features"), [(1, 2), (5, 6), (64, 1024), (300, 130)])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_products_are_those_of_the_selected_entries(
    dtype: torch.dtype, tolerance: float, size: int, features: int, rows: int, gated: bool
) -> None:
    x_RD, weight_DF = random_rows(rows, size, dtype), random_rows(size, features, dtype)
    bias_F = None if gated else random_rows(1, features, dtype)[0]
    addend_RF = None if gated else random_rows(rows, features, dtype)
    for keep in keeps(size):
        selection = select(x_RD, keep)
        dense_RD = scatter(selection, size)
        true_RF = product(dense_RD, weight_DF, bias_F=bias_F, addend=addend_RF, gated=gated)
        found_RF = sparse_linear(selection, weight_DF, bias_F, addend_RF=addend_RF, gated=gated)
        assert found_RF.shape == true_RF.shape
        assert found_RF.dtype == dtype
        shared_RF = masked_linear(dense_RD, weight_DF, bias_F, addend_RF=addend_RF, gated=gated)
        if rows:
            assert relative_error(found_RF, true_RF) < tolerance
            assert relative_error(shared_RF, true_RF) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_each_row_takes_the_weight_of_its_expert(dtype: torch.dtype, tolerance: float) -> None:
    weight_EDF = random_rows(3 * 64, 40, dtype).view(3, 64, 40)
    bias_EF, expert_R = random_rows(3, 40, dtype), torch.tensor([2, 0, 2, 1])
    selection = select(random_rows(4, 64, dtype), 20)
    found_RF = sparse_expert_linear(selection, weight_EDF, expert_R, bias_EF)
    gated_RF = sparse_expert_linear(selection, weight_EDF, expert_R, gated=True)
    for row, expert in enumerate(expert_R.tolist()):
        x_1D = scatter(selection, 64)[row, None]
        true_1F = product(x_1D, weight_EDF[expert], bias_F=bias_EF[expert], addend=None, gated=False)
        assert relative_error(found_RF[row, None], true_1F) < tolerance
        true_1F = product(x_1D, weight_EDF[expert], bias_F=None, addend=None, gated=True)
        assert relative_error(gated_RF[row, None], true_1F) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strips_of_a_weight_give_what_the_whole_gives(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    selection, weight_DF = select(random_rows(1, 300, dtype), 120), random_rows(300, 1024, dtype)
    found = []
    for threads in (1, 2, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert kernels._strips(1, 1024) == threads
        found.append(sparse_linear_torch(*selection, weight_DF))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_rows_of_the_weight_that_are_not_selected_are_not_read() -> None:
    x_RD, weight_DF = random_rows(1, 64, torch.float32), random_rows(64, 40, torch.float32)
    selection = select(x_RD, 30)
    true_RF = sparse_linear(selection, weight_DF)
    dropped_D = torch.ones(64, dtype=torch.bool).scatter(0, selection.index_RK[0].long(), False)
    weight_DF[dropped_D] = torch.nan
    assert torch.equal(sparse_linear(selection, weight_DF), true_RF)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)
def test_rows_of_the_weight_that_no_row_needs_are_not_read(
    dtype: torch.dtype, tolerance: float, rows: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows keep what exceeds a threshold, each another number of entries, one none; together less than there are."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x_RD, weight_DF = random_rows(rows, 640, dtype), random_rows(640, 1024, dtype)
    x_RD = above(x_RD, x_RD.abs().float().quantile(1 - 0.9 / rows).item())
    if rows > 1:
        x_RD[1] = 0
    assert len(set((x_RD != 0).sum(1).tolist())) > rows // 2
    addend_RF, bias_F = random_rows(rows, 1024, dtype), random_rows(1, 1024, dtype)[0]
    true_RF = product(x_RD, weight_DF, bias_F=bias_F, addend=addend_RF, gated=False)
    gated_RF = product(x_RD, weight_DF, bias_F=None, addend=None, gated=True)
    weight_DF[(x_RD == 0).all(0)] = torch.nan
    assert relative_error(masked_linear(x_RD, weight_DF, bias_F, addend_RF=addend_RF), true_RF) < tolerance
    assert relative_error(masked_linear(x_RD, weight_DF, gated=True), gated_RF) < tolerance


@pytest.mark.parametrize("keep", [200, 300])
def test_many_rows_and_rows_that_need_more_than_there_is_read_everything(keep: int) -> None:
    rows = 9 if keep == 200 else 3
    x_RD, weight_DF = masked(random_rows(rows, 640, torch.float32), keep), random_rows(640, 40, torch.float32)
    assert torch.equal(masked_linear(x_RD, weight_DF), x_RD @ weight_DF)


gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class TestKernels:
    """The Triton kernels."""

    pytestmark = gpu

    @pytest.mark.parametrize("ties", [False, True])
    @pytest.mark.parametrize("size", [*SIZES, 2047, 4096, 11008, 16384])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_selections_are_those_of_the_twin(self, dtype: torch.dtype, size: int, ties: bool) -> None:
        x_RD = random_rows(3, size, dtype, ties=ties).cuda()
        scale_D = random_rows(1, size, torch.float32)[0].abs().cuda()
        for keep in {*keeps(size), max(size // 2, 1), max(3 * size // 5, 1)}:
            true = select_torch(x_RD, keep)
            assert_same(select(x_RD, keep), true)
            assert_same(select(x_RD, keep, scale_D), select_torch(x_RD, keep, scale_D))
            scale_RD = random_rows(3, size, torch.float32).abs().cuda()
            own = select_torch(x_RD, keep, scale_RD)
            assert_same(select(x_RD, keep, scale_RD), own)
            assert torch.equal(masked(x_RD, keep, scale_RD), scatter(own, size))
            assert torch.equal(masked(x_RD, keep), scatter(true, size))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_rows_of_nan_and_zeros_keep_as_many_as_any(self, dtype: torch.dtype) -> None:
        x_RD = torch.full((4, 100), torch.nan, dtype=dtype, device="cuda")
        x_RD[1, ::2], x_RD[2], x_RD[3] = 1.0, 0.0, -0.0
        for keep in (1, 50, 100):
            index_RK = select(x_RD, keep).index_RK
            assert (index_RK[:, 1:] > index_RK[:, :-1]).all()
            assert index_RK.min() >= 0
            assert index_RK.max() < 100
            assert torch.equal(index_RK[2].cpu(), torch.arange(keep, dtype=torch.int32))

    @pytest.mark.parametrize("gain", [False, True])
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
    def test_a_norm_comes_before_its_selection(self, dtype: torch.dtype, tolerance: float, gain: bool) -> None:
        x_RD = random_rows(3, 1000, dtype).cuda()
        gain_D = random_rows(1, 1000, dtype)[0].cuda() if gain else None
        normed_RD = norm_masked(x_RD, 1000, 1e-5, gain_D)
        assert relative_error(normed_RD, F.rms_norm(x_RD, (1000,), gain_D, 1e-5)) < tolerance
        for scale_D in (None, torch.linspace(1, 3, 1000).cuda()):
            true = select_torch(normed_RD, 300, scale_D)
            assert_same(norm_select(x_RD, 300, 1e-5, gain_D, scale_D), true)
            assert torch.equal(norm_masked(x_RD, 300, 1e-5, gain_D, scale_D), scatter(true, 1000))

    @pytest.mark.parametrize("size", [*SIZES, 4096, 11008])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_what_exceeds_a_threshold_is_that_of_the_twin(self, dtype: torch.dtype, size: int) -> None:
        x_RD = random_rows(3, size, dtype).cuda()
        x_RD[1, 0] = torch.nan
        own_RD = random_rows(3, size, torch.float32).abs().cuda()
        for scale in (None, own_RD[0], own_RD):
            torch.testing.assert_close(
                above(x_RD, 0.7, scale), above_torch(x_RD, 0.7, scale), rtol=0, atol=0, equal_nan=True
            )

    @pytest.mark.parametrize("gain", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_norm_comes_before_its_threshold(self, dtype: torch.dtype, gain: bool) -> None:
        x_RD, scale_D = random_rows(3, 1000, dtype).cuda(), torch.linspace(1, 3, 1000).cuda()
        gain_D = random_rows(1, 1000, dtype)[0].cuda() if gain else None
        normed_RD = norm_above(x_RD, -1.0, 1e-5, gain_D)
        assert relative_error(normed_RD, F.rms_norm(x_RD, (1000,), gain_D, 1e-5)) < 5e-3
        assert torch.equal(norm_above(x_RD, 0.7, 1e-5, gain_D, scale_D), above_torch(normed_RD, 0.7, scale_D))

    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("rows", [0, 1, 2, 8, 9])
    @pytest.mark.parametrize(
        ("size", "features"), [(1, 2), (5, 6), (64, 1024), (300, 130), (4096, 12288), (1111, 4096), (4096, 22016)]
    )
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
    def test_products_are_those_of_the_selected_entries(
        self, dtype: torch.dtype, tolerance: float, size: int, features: int, rows: int, gated: bool
    ) -> None:
        x_RD, weight_DF = random_rows(rows, size, dtype).cuda(), random_rows(size, features, dtype).cuda()
        bias_F = None if gated else random_rows(1, features, dtype)[0].cuda()
        addend_RF = None if gated else random_rows(rows, features, dtype).cuda()
        extras = {"addend_RF": addend_RF, "gated": gated}
        for keep in keeps(size):
            selection = select(x_RD, keep)
            dense_RD = scatter(selection, size)
            true_RF = product(dense_RD, weight_DF, bias_F=bias_F, addend=addend_RF, gated=gated)
            found_RF = sparse_linear(selection, weight_DF, bias_F, **extras)
            shared_RF = masked_linear(dense_RD, weight_DF, bias_F, **extras)
            assert found_RF.shape == shared_RF.shape == true_RF.shape
            if rows:
                assert relative_error(found_RF, true_RF) < tolerance
                assert relative_error(shared_RF, true_RF) < tolerance
            # the same once more: the tickets are back at zero, and nothing depends on which program ends last
            assert torch.equal(sparse_linear(selection, weight_DF, bias_F, **extras), found_RF)
            assert torch.equal(masked_linear(dense_RD, weight_DF, bias_F, **extras), shared_RF)

    @pytest.mark.parametrize("stages", [1, 3])
    @pytest.mark.parametrize("parts", [1, 2, 7, 64])
    def test_a_product_may_be_cut_in_any_way(self, parts: int, stages: int) -> None:
        from raygrow.kernels.triton_sparse_linear import Tiling, nonzero_linear_triton, sparse_linear_triton

        x_RD, weight_DF = random_rows(1, 700, torch.bfloat16).cuda(), random_rows(700, 520, torch.bfloat16).cuda()
        selection = select(x_RD, 333)
        dense_RD = scatter(selection, 700)
        true_RF = product(dense_RD, weight_DF, bias_F=None, addend=None, gated=False)
        cut = Tiling(columns=128, chunk=16, parts=parts, warps=4, stages=stages)
        every = sparse_linear_triton(None, dense_RD, weight_DF, tiling=cut)
        needed = sparse_linear_triton(None, dense_RD, weight_DF, skip_zeros=True, tiling=cut)
        assert relative_error(sparse_linear_triton(*selection, weight_DF, tiling=cut), true_RF) < 1e-2
        assert relative_error(every, true_RF) < 1e-2
        assert torch.equal(every, needed)
        assert relative_error(nonzero_linear_triton(dense_RD, weight_DF, tiling=cut), true_RF) < 1e-2

    @pytest.mark.parametrize("gated", [False, True])
    def test_each_row_takes_the_weight_of_its_expert(self, gated: bool) -> None:
        weight_EDF = random_rows(3 * 200, 640, torch.bfloat16).view(3, 200, 640).cuda()
        expert_R = torch.tensor([2, 0, 2, 1], device="cuda")
        selection = select(random_rows(4, 200, torch.bfloat16).cuda(), 77)
        found_RF = sparse_expert_linear(selection, weight_EDF, expert_R, gated=gated)
        for row, expert in enumerate(expert_R.tolist()):
            x_1D = scatter(selection, 200)[row, None]
            true_1F = product(x_1D, weight_EDF[expert], bias_F=None, addend=None, gated=gated)
            assert relative_error(found_RF[row, None], true_1F) < 1e-2

    def test_rows_of_the_weight_that_are_not_selected_are_not_read(self) -> None:
        x_RD, weight_DF = random_rows(1, 640, torch.bfloat16).cuda(), random_rows(640, 512, torch.bfloat16).cuda()
        selection = select(x_RD, 200)
        true_RF = sparse_linear(selection, weight_DF)
        weight_DF[scatter(selection, 640)[0] == 0] = torch.nan
        assert torch.equal(sparse_linear(selection, weight_DF), true_RF)

    def test_a_cuda_graph_is_replayed_for_other_rows(self) -> None:
        first_RD, second_RD = random_rows(2, 1024, torch.bfloat16).cuda().split(1)
        weight_DF, back_FD = (
            random_rows(1024, 1024, torch.bfloat16).cuda(),
            random_rows(512, 1024, torch.bfloat16).cuda(),
        )

        def step(x_RD: Tensor) -> Tensor:
            h_RF = sparse_linear(norm_select(x_RD, 400, 1e-5), weight_DF, gated=True)
            x_RD = sparse_linear(select(h_RF, 200), back_FD, addend_RF=x_RD)
            return masked_linear(norm_masked(x_RD, 300, 1e-5), weight_DF)

        true = [step(first_RD), step(second_RD)]
        torch.cuda.synchronize()
        input_RD = first_RD.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out_RF = step(input_RD)
        for x_RD, true_RF in zip((first_RD, second_RD, first_RD), (*true, true[0]), strict=True):
            input_RD.copy_(x_RD)
            graph.replay()
            assert torch.equal(out_RF, true_RF)
