"""What skips the weights of units at zero computes what the dense product does, and reads no others.

Shapes: R rows, D model, F hidden units.
"""

import pytest
import torch
from torch import Tensor

from raygrow.kernels import zeros as kernels
from raygrow.kernels.zeros import nonzero_linear, rectified_linear, rectified_linear_dense

DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
ROWS = [0, 1, 2, 3, 8, 9, 20]


def gates(rows: int, units: int, share: float, dtype: torch.dtype) -> Tensor:
    """Open for a share of the units, which are others for every row."""
    generator = torch.Generator().manual_seed(rows)
    gate_RF = torch.randn(rows, units, generator=generator, dtype=torch.float64)
    open_RF = torch.rand(rows, units, generator=generator) < share
    return torch.where(open_RF, gate_RF.abs(), -gate_RF.abs()).to(dtype)


def random(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def relative_error(found: Tensor, true: Tensor) -> float:
    return ((found.double() - true.double()).norm() / true.double().norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)
def test_products_are_those_of_all_weights(dtype: torch.dtype, tolerance: float, rows: int, share: float) -> None:
    gate_RF, x_RD, up_FD, bias_F = (
        gates(rows, 70, share, dtype),
        random(rows, 33, dtype=dtype),
        random(70, 33, dtype=dtype),
        random(70, dtype=dtype),
    )
    for bias in (None, bias_F):
        found_RF = rectified_linear(gate_RF, x_RD, up_FD, bias)
        wide = (x.double() for x in (gate_RF, x_RD, up_FD))
        true_RF = rectified_linear_dense(*wide, None if bias is None else bias.double())
        assert found_RF.dtype == dtype
        assert relative_error(found_RF, true_RF) <= tolerance
        assert torch.equal(found_RF == 0, true_RF == 0)
    hidden_RF, down_FD = found_RF, random(70, 33, dtype=dtype)
    for bias_D, addend_RD in ((None, None), (random(33, dtype=dtype), None), (None, x_RD), (down_FD[0], x_RD)):
        found_RD = nonzero_linear(hidden_RF, down_FD, bias_D, addend_RD=addend_RD)
        true_RD = hidden_RF.double() @ down_FD.double()
        for part in (bias_D, addend_RD):
            true_RD = true_RD if part is None else true_RD + part.double()
        assert found_RD.dtype == dtype
        assert relative_error(found_RD, true_RD) <= tolerance


@pytest.mark.parametrize("rows", [1, 3])
def test_weights_of_units_at_zero_are_not_read(rows: int) -> None:
    gate_RF, x_RD = gates(rows, 64, 0.05, torch.float32), random(rows, 16, dtype=torch.float32)
    up_FD, down_FD = (random(64, 16, dtype=torch.float32) for _ in range(2))
    for weight_FD in (up_FD, down_FD):
        weight_FD[~(gate_RF > 0).any(0)] = torch.nan
    hidden_RF = rectified_linear(gate_RF, x_RD, up_FD)
    assert not hidden_RF.isnan().any()
    assert not nonzero_linear(hidden_RF, down_FD).isnan().any()


def test_where_most_units_are_used_the_dense_product_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    gate_RF, x_RD, up_FD = (
        gates(1, 64, 0.9, torch.float32),
        random(1, 16, dtype=torch.float32),
        random(64, 16, dtype=torch.float32),
    )
    assert torch.equal(rectified_linear(gate_RF, x_RD, up_FD), rectified_linear_dense(gate_RF, x_RD, up_FD))
    monkeypatch.setattr(kernels, "USED_SHARE", 1.0)
    up_FD[~(gate_RF > 0).any(0)] = torch.nan
    assert not rectified_linear(gate_RF, x_RD, up_FD).isnan().any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("units", "size"), [(70, 33), (1000, 300), (4096, 1024)])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES[1:], ids=str)
def test_kernels_are_their_twins(
    dtype: torch.dtype, tolerance: float, rows: int, units: int, size: int, share: float
) -> None:
    gate_RF, x_RD = gates(rows, units, share, dtype).cuda(), random(rows, size, dtype=dtype).cuda()
    up_FD, bias_F = random(units, size, dtype=dtype).cuda(), random(units, dtype=dtype).cuda()
    if 0 < rows <= kernels.FEW_ROWS:
        up_FD[~(gate_RF > 0).any(0)] = torch.nan
    true_RF = rectified_linear_dense(*(x.double() for x in (gate_RF, x_RD, up_FD.nan_to_num(), bias_F)))
    found_RF = rectified_linear(gate_RF, x_RD, up_FD, bias_F)
    assert relative_error(found_RF, true_RF) <= tolerance
    down_FD = random(units, size, dtype=dtype).cuda()
    if 0 < rows <= kernels.FEW_ROWS:
        down_FD[(found_RF == 0).all(0)] = torch.nan
    found_RD = nonzero_linear(found_RF, down_FD, addend_RD=x_RD)
    true_RD = found_RF.double() @ down_FD.nan_to_num().double() + x_RD.double()
    assert relative_error(found_RD, true_RD) <= tolerance
    assert torch.equal(nonzero_linear(found_RF, down_FD, addend_RD=x_RD), found_RD)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 4])
def test_a_graph_replays_with_other_units(rows: int) -> None:
    make = {"dtype": torch.bfloat16}
    gate_RF, x_RD = gates(rows, 512, 0.1, torch.bfloat16).cuda(), random(rows, 256, **make).cuda()
    up_FD, down_FD = (random(512, 256, **make).cuda() for _ in range(2))

    def run() -> Tensor:
        return nonzero_linear(rectified_linear(gate_RF, x_RD, up_FD), down_FD)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_RD = run()
    gate_RF.copy_(gate_RF.flip(1))
    graph.replay()
    assert relative_error(out_RD, rectified_linear_dense(gate_RF, x_RD, up_FD) @ down_FD) <= 1e-2
