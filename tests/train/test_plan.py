"""A plan is resolved from its target backward, and says what is wrong with it."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from raygrow.growth.depth import Depth
from raygrow.growth.experts import Experts
from raygrow.growth.gstack import Gstack
from raygrow.growth.width import Width
from raygrow.nn.config import ModelConfig
from raygrow.nn.cost import active_parameters, block_flops, head_flops, training_flops_per_token
from raygrow.nn.init import init_weights
from raygrow.nn.rack import Rack
from raygrow.train.config import PhaseConfig, PlanConfig, ScheduleConfig, TrainConfig
from raygrow.train.dry_run import describe
from raygrow.train.plan import resolve, scratch_plan
from raygrow.train.schedule import learning_rate
from raygrow.weights.folder import write_folder

TARGET = ModelConfig(vocab_size=512, d_model=64, n_heads=4, d_ff=128, blocks_per_stack=12, max_seq_len=64)
TRAIN = TrainConfig(seq_len=64, batch_size=8)


def plan(**phases: PhaseConfig) -> PlanConfig:
    return PlanConfig(tokens=1e6, phases=phases)


def test_models_follow_from_the_target() -> None:
    phases = resolve(
        plan(
            base=PhaseConfig(share=0.05),
            twice=PhaseConfig(share=0.1, growth=Gstack(factor=2)),
            large=PhaseConfig(growth=Gstack(factor=3)),
        ),
        TARGET,
        TRAIN,
    )
    assert [phase.model.n_blocks for phase in phases] == [2, 4, 12]
    assert phases[2].model.regrouped(1) == TARGET
    assert phases[1].source == phases[0].model


def test_every_phase_is_paid_from_the_budget() -> None:
    phases = resolve(plan(base=PhaseConfig(share=0.05), stacked=PhaseConfig(growth=Gstack(factor=4))), TARGET, TRAIN)
    budget = 1e6 * training_flops_per_token(TARGET, TRAIN.seq_len)
    assert phases[0].flops == pytest.approx(0.05 * budget, rel=0.02)
    assert phases[0].flops + phases[1].flops == pytest.approx(budget, rel=0.002)
    assert phases[1].flops_before == phases[0].flops
    (control,) = resolve(scratch_plan(phases), TARGET, TRAIN)
    assert control.flops == pytest.approx(budget, rel=0.002)
    assert control.model == TARGET


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_runs_decay_over_as_many_flops_whenever_they_grow(share: float) -> None:
    phases = resolve(plan(base=PhaseConfig(share=share), stacked=PhaseConfig(growth=Gstack(factor=4))), TARGET, TRAIN)
    base, stacked = phases
    (control,) = resolve(scratch_plan(phases), TARGET, TRAIN)
    assert base.schedule.decay == 0
    decayed, total = stacked.schedule.decay * stacked.flops, base.flops + stacked.flops
    assert decayed == pytest.approx(min(TRAIN.schedule.decay * total, stacked.flops))
    assert control.schedule.decay * control.flops == pytest.approx(decayed, rel=1e-2)  # whole steps


def test_the_control_takes_the_last_phases_batch_and_decay() -> None:
    last = PhaseConfig(growth=Gstack(factor=4), decay=0.5, lr=3e-3, batch_size=4, warmup_steps=7)
    phases = resolve(plan(base=PhaseConfig(share=0.05), stacked=last), TARGET, TRAIN)
    (control,) = resolve(scratch_plan(phases), TARGET, TRAIN)
    decay = 0.5 * phases[1].flops / sum(phase.flops for phase in phases)
    assert control.schedule.decay == pytest.approx(decay, abs=1e-8)  # over as many FLOPs
    assert (control.lr, control.batch_size) == (3e-3, 4)
    assert control.schedule.warmup_steps == TRAIN.schedule.warmup_steps


def test_frozen_parameters_cost_less() -> None:
    def cost(*frozen: str) -> float:
        return resolve(PlanConfig(phases={"x": PhaseConfig(steps=1, frozen=frozen)}), TARGET, TRAIN)[0].flops_per_token

    block, head = block_flops(TARGET, 0, 64), head_flops(TARGET)
    assert cost() - cost("blocks.11.*") == pytest.approx(block.weight_gradient)
    assert cost() - cost("embedding.*", "blocks.0.*") == pytest.approx(block.weight_gradient + block.input_gradient)
    assert cost() - cost("blocks.3.mlp.*") == 0  # its attention still trains
    assert cost("embedding.*", "blocks.*", "norm.*") == pytest.approx(
        12 * block.forward + head.forward + head.weight_gradient
    )


def test_a_base_is_grown_at_its_peak_learning_rate() -> None:
    phases = resolve(plan(base=PhaseConfig(share=0.05), stacked=PhaseConfig(growth=Gstack(factor=4))), TARGET, TRAIN)
    last = [learning_rate(p.steps - 1, steps=p.steps, peak=p.lr, schedule=p.schedule) for p in phases]
    assert last == [pytest.approx(1e-3), pytest.approx(0, abs=1e-9)]


def test_data_goes_on_where_the_phase_before_stopped() -> None:
    phases = resolve(
        plan(base=PhaseConfig(steps=3, seq_len=32), stacked=PhaseConfig(growth=Gstack(factor=4))), TARGET, TRAIN
    )
    assert phases[1].tokens_before == 3 * 8 * 32
    assert phases[1].first_sample * 64 >= phases[1].tokens_before


@pytest.mark.parametrize("kind", ["wsd", "cosine"])
def test_schedules_warm_up_and_decay(kind: str) -> None:
    schedule = ScheduleConfig(kind=kind, warmup_steps=10, decay=0.5, final_ratio=0.1)
    rates = [learning_rate(step, steps=100, peak=2.0, schedule=schedule) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.2)
    assert all(later <= earlier for earlier, later in pairwise(rates[9:]))


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ({"base": PhaseConfig(share=0.1), "x": PhaseConfig(growth=Gstack(factor=5))}, r"plan\.phases\.x\.growth.*5"),
        ({"x": PhaseConfig(growth=Gstack(factor=2))}, "the first phase has no model to grow"),
        ({"base": PhaseConfig(share=0.1, steps=3)}, "sets share and steps"),
        ({"base": PhaseConfig(share=1.01), "x": PhaseConfig(growth=Gstack(factor=2))}, "would never run"),
        ({"base": PhaseConfig(share=0.7), "x": PhaseConfig(share=0.7, growth=Gstack(factor=2))}, "add up to"),
        ({"base": PhaseConfig(tokens=3)}, "less than one step"),
        ({"base": PhaseConfig(steps=1, frozen=("blok.*",))}, r"plan\.phases\.base\.frozen=.*'blok\.\*' matches no"),
        ({"base": PhaseConfig(steps=1, frozen=("*",))}, r"plan\.phases\.base\.frozen=.*no parameter is left"),
        ({"base": PhaseConfig(seq_len=48)}, "does not divide"),
        ({"a": PhaseConfig(steps=1, save_end="x"), "b": PhaseConfig(save_start="x")}, r"plan\.phases\.b\.save_start=x"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_names_the_phase(phases: dict[str, PhaseConfig], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(plan(**phases), TARGET, TRAIN)


def test_a_share_is_of_a_budget() -> None:
    with pytest.raises(ValueError, match=r"plan\.phases\.base\.share=0\.1 is of the plan's budget"):
        resolve(PlanConfig(phases={"base": PhaseConfig(share=0.1)}), TARGET, TRAIN)


def test_a_range_of_workers_rises() -> None:
    with pytest.raises(ValueError, match=r"^workers=\[4, 1\]: a range"):
        PhaseConfig(workers=(4, 1))


@pytest.mark.parametrize("name", ["a/b", ".a", "", "training_history.jsonl"])
def test_a_saved_model_has_a_name_of_its_own(name: str) -> None:
    with pytest.raises(ValueError, match=r"^save_end="):
        PhaseConfig(save_end=name)


def test_a_phase_may_start_from_a_model_folder(tmp_path: Path) -> None:
    small = Gstack(factor=4).shrink(TARGET)
    rack = Rack(small)
    init_weights(rack, small, seed=0)
    folder = write_folder(tmp_path / "small", small, rack.state_dict().items())
    phase = PhaseConfig(init=str(folder), growth=Gstack(factor=4))
    assert resolve(plan(grown=phase), TARGET, TRAIN)[0].source == small
    with pytest.raises(ValueError, match="blocks"):
        resolve(plan(grown=PhaseConfig(init=str(folder), growth=Gstack(factor=2))), TARGET, TRAIN)


@pytest.mark.parametrize("name", ["", "a/b", ".hidden"])
def test_a_saved_model_has_a_plain_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"save_end='.*plain name"):
        PhaseConfig(save_end=name)


@pytest.mark.parametrize("phase", [{}, {"growth": Gstack(factor=2), "init": "folder"}])
def test_copies_are_told_apart_only_where_a_model_in_training_is_grown(phase: dict) -> None:
    with pytest.raises(ValueError, match="optimizer_state=asymmetric"):
        PhaseConfig(steps=1, optimizer_state="asymmetric", **phase)


def test_a_dry_run_of_every_operator() -> None:
    target = replace(TARGET, d_ff=256, blocks_per_stack=5, n_experts=8, top_k=2)
    stages = {
        "dense": PhaseConfig(steps=1),
        "stacked": PhaseConfig(steps=1, growth=Gstack(factor=2)),
        "moe": PhaseConfig(steps=1, growth=Experts(n_experts=8, top_k=2)),
        "wide": PhaseConfig(steps=1, growth=Width(factor=2, untie=True)),
        "deep": PhaseConfig(steps=1, growth=Depth(extra_layers=1, identity=True)),
    }
    phases = resolve(PlanConfig(phases=stages), target, TRAIN)
    dense = phases[0].model
    assert (dense.d_model, dense.n_heads, dense.d_ff, dense.n_blocks, dense.n_experts) == (32, 2, 128, 2, 0)
    assert dense.tie_embeddings
    *_, deep, _ = describe(phases, TRAIN, workers=2).splitlines()
    assert "depth (extra_layers 1, source last, identity True)" in deep
    assert f"{sum(p.numel() for p in Rack(target).parameters()):,}" in deep
    assert f"{active_parameters(target):,}" in deep


def test_a_dry_run_builds_and_grows_every_phase() -> None:
    phases = resolve(plan(base=PhaseConfig(share=0.05), stacked=PhaseConfig(growth=Gstack(factor=4))), TARGET, TRAIN)
    text = describe(phases, TRAIN, workers=2)
    assert "gstack (factor 4)" in text
    assert f"{sum(p.numel() for p in Rack(TARGET).parameters()):,}" in text


def test_a_dry_run_counts_a_phases_own_workers() -> None:
    phase = PhaseConfig(steps=1, workers=(4, 8))
    (own,), (runs,) = (resolve(plan(x=config), TARGET, TRAIN) for config in (phase, PhaseConfig(steps=1)))
    assert describe([own], TRAIN, workers=1) == describe([runs], TRAIN, workers=(4, 8))
    assert describe([own], TRAIN, workers=1) != describe([runs], TRAIN, workers=1)


def test_a_phase_has_its_own_weight_on_activations_or_the_runs() -> None:
    train, model = replace(TRAIN, activation_l1=0.5), replace(TARGET, mlp="relu2")
    base, pressed = resolve(
        PlanConfig(phases={"base": PhaseConfig(steps=5), "pressed": PhaseConfig(steps=5, activation_l1=2.0)}),
        model,
        train,
    )
    assert (base.activation_l1, pressed.activation_l1) == (0.5, 2.0)


def test_activations_that_are_never_zero_are_not_weighed() -> None:
    phase = PhaseConfig(steps=5, activation_l1=2.0)
    with pytest.raises(ValueError, match=r"plan.phases.base.activation_l1=2: .*mlp=swiglu .*reglu, relu or relu2"):
        resolve(PlanConfig(phases={"base": phase}), TARGET, TRAIN)
    with pytest.raises(ValueError, match=r"^train.activation_l1=0.5"):
        resolve(PlanConfig(phases={"base": PhaseConfig(steps=5)}), TARGET, replace(TRAIN, activation_l1=0.5))
