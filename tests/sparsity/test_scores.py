"""What is learnt from scores that come batch by batch."""

import pytest
import torch

from raygrow.kernels.group_select import GROUP, group_kept
from raygrow.sparsity.scores import Histogram, RankedEnergy


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
    with pytest.raises(ValueError, match="activations on the calibration text are no numbers"):
        RankedEnergy(4).add(x)


@pytest.mark.parametrize("keep", [1, 40, 90, 100])
def test_no_other_groups_of_as_many_keep_more_energy(keep: int) -> None:
    generator = torch.Generator().manual_seed(3)
    sizes_D = torch.linspace(0.2, 2.0, 100)[torch.randperm(100, generator=generator)]
    score_RD = torch.rand(500, 100, generator=generator) * sizes_D
    energy = RankedEnergy(100)
    for part in score_RD.split(200):
        energy.add(part)
    groups = energy.groups(keep)
    assert sum(groups) == keep
    assert len(groups) == 4
    assert max(groups[-1] - 4, *(count - GROUP for count in groups)) <= 0

    def kept(counts: tuple[int, ...]) -> float:
        return score_RD[group_kept(score_RD, torch.tensor(counts))].square().sum().item()

    for more in range(4):
        for less in range(4):
            moved = list(groups)
            moved[more] += 1
            moved[less] -= 1
            if more != less and min(moved) >= 0 and moved[more] <= (GROUP if more < 3 else 4):
                assert kept(tuple(moved)) <= kept(groups) * (1 + 1e-6)
