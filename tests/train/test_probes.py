"""Copies that growth made of heads and experts are seen to be together, and to come apart."""

import copy

import pytest
import torch

from raygrow.growth.experts import Experts
from raygrow.growth.gstack import Gstack
from raygrow.growth.model import grow_model
from raygrow.growth.operator import GrowthConfig
from raygrow.growth.width import Width
from raygrow.nn.config import ModelConfig
from raygrow.nn.init import init_weights
from raygrow.nn.rack import Rack
from raygrow.train.config import PhaseConfig, PlanConfig, TrainConfig
from raygrow.train.plan import Phase, resolve
from raygrow.train.probes import divergences, still_together

SOURCE = ModelConfig(vocab_size=48, d_model=16, n_heads=2, d_ff=64, blocks_per_stack=2, max_seq_len=16)


def grown(growth: GrowthConfig, steps: int = 20) -> tuple[Rack, Phase]:
    """The grown model of a phase that begins with a growth."""
    source = Rack(SOURCE)
    init_weights(source, SOURCE, seed=0)
    plan = PlanConfig(phases={"base": PhaseConfig(steps=1), "grown": PhaseConfig(steps=steps, growth=growth)})
    model = grow_model(source, growth)
    return model, resolve(plan, model.config, TrainConfig(seq_len=16, batch_size=1))[1]


@pytest.mark.parametrize(
    ("growth", "metric"),
    [
        (Width(factor=2, noise_snr_db=0), "head_divergence"),
        (Width(factor=3, noise_snr_db=10), "head_divergence"),  # noise that cancels is no divergence
        (Width(heads=2), "head_divergence"),
        (Experts(n_experts=4, top_k=2), "expert_divergence"),
    ],
)
def test_copies_start_together(growth: GrowthConfig, metric: str) -> None:
    model, phase = grown(growth)
    assert divergences(model, phase) == {metric: pytest.approx(0, abs=5e-7)}


@torch.no_grad()
@pytest.mark.parametrize(
    ("growth", "metric"),
    [(Width(factor=2), "head_divergence"), (Experts(n_experts=4, top_k=2), "expert_divergence")],
)
def test_unrelated_ones_are_about_1_apart(growth: GrowthConfig, metric: str) -> None:
    model, phase = grown(growth)
    init_weights(model, model.config, seed=1)
    assert divergences(model, phase)[metric] == pytest.approx(1, abs=0.05)


@torch.no_grad()
def test_one_copy_that_left_is_seen() -> None:
    model, phase = grown(Experts(n_experts=4, top_k=2))
    together = copy.deepcopy(model)
    model.blocks[1].mlp.experts.up.weight[3] *= 1.1
    assert divergences(together, phase)["expert_divergence"] == 0
    # the mean moves by 1/4 of 0.1: sqrt(3 * 0.025^2 + 0.075^2) / sqrt(3 + 1.1^2), of one Block in two
    assert divergences(model, phase)["expert_divergence"] == pytest.approx((0.0075 / 4.21 * 4 / 3) ** 0.5 / 2, rel=1e-3)


@pytest.mark.parametrize(
    "growth", [Gstack(factor=2), Width(heads=1, noise_snr_db=0), Experts(n_experts=1, top_k=1), None]
)
def test_where_nothing_was_copied_there_is_nothing_to_watch(growth: GrowthConfig | None) -> None:
    if growth:
        assert divergences(*grown(growth)) == {}
    else:
        plan = PlanConfig(phases={"base": PhaseConfig(steps=1)})
        (phase,) = resolve(plan, SOURCE, TrainConfig(seq_len=16, batch_size=1))
        assert divergences(Rack(SOURCE), phase) == {}


def test_copies_that_do_not_part_are_told_with_the_cure() -> None:
    _, phase = grown(Width(factor=2, noise_snr_db=0))
    assert "noise_snr_db" in (still_together(phase, {"head_divergence": 1e-8}) or "")
    assert "router_std" in (still_together(phase, {"expert_divergence": 0.0}) or "")
    assert still_together(phase, {"head_divergence": 1e-3}) is None
    assert still_together(phase, {}) is None
    _, short = grown(Width(factor=2, noise_snr_db=0), steps=19)
    assert still_together(short, {"head_divergence": 1e-8}) is None
