"""Quantiles of magnitudes that were counted batch by batch."""

import pytest
import torch

from raygrow.sparsity.histogram import Histogram


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantiles_are_those_of_all_batches_together(dtype: torch.dtype) -> None:
    histogram, x = Histogram(), torch.randn(4, 5000, generator=torch.Generator().manual_seed(1)).to(dtype)
    for part in x:
        histogram.add(part)
    for share in (0.1, 0.5, 0.99):
        assert histogram.quantile(share) == pytest.approx(x.float().abs().quantile(share).item(), rel=0.02)
    assert histogram.quantile(0.0) == 0.0


@pytest.mark.parametrize("damage", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_is_refused(damage: float) -> None:
    x = torch.ones(3, 4)
    x[1, 2] = damage
    with pytest.raises(ValueError, match="activations on the calibration text are no numbers"):
        Histogram().add(x)
