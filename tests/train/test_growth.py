"""Growth inside two workers gives what its rules give in one process: weights, Adam's moments, step counts."""

from pathlib import Path

import pytest
import torch

from raygrow.growth.depth import Depth
from raygrow.growth.experts import Experts
from raygrow.growth.width import Width
from raygrow.nn.config import ModelConfig
from raygrow.train.checkpoint import CheckpointTensors
from raygrow.train.config import PhaseConfig, PlanConfig, ScheduleConfig, TrainConfig
from raygrow.train.loop import Outcome, train_phase
from raygrow.train.plan import Phase, resolve
from raygrow.train.session import FolderSession, checkpoint_name
from raygrow.weights.apply import apply_rules
from raygrow.weights.moments import moment_rules
from tests.distributed import run_distributed

TARGET = ModelConfig(
    vocab_size=512,
    d_model=48,
    n_heads=6,
    n_kv_heads=3,
    head_dim=8,
    d_ff=48,
    blocks_per_stack=3,
    max_seq_len=32,
    n_experts=3,
    top_k=2,
)
"""Widths of a base that two workers cannot cut evenly."""

TRAIN = TrainConfig(
    seq_len=32,
    batch_size=4,
    report_every=2,
    evaluate_every=2,
    checkpoint_every=2,
    schedule=ScheduleConfig(warmup_steps=1),
)
PLAN = PlanConfig(
    phases={
        "base": PhaseConfig(steps=2),
        "moe": PhaseConfig(steps=2, growth=Experts(n_experts=3, top_k=2, drop=0.5)),
        "wide": PhaseConfig(steps=2, growth=Width(factor=3), optimizer_state="asymmetric"),
        "deep": PhaseConfig(steps=2, growth=Depth(extra_layers=1, identity=True)),
    }
)
PHASES = {phase.name: phase for phase in resolve(PLAN, TARGET, TRAIN)}


def train(folder: Path, data: Path) -> list[Outcome]:
    """All phases on this worker."""
    outcomes, source = [], None
    for phase in PHASES.values():
        session = FolderSession(folder / phase.name)
        outcomes.append(train_phase(phase, TRAIN, data=data, seed=0, source=source, session=session, device="cpu"))
        source = end(folder, phase)
    return outcomes


def end(folder: Path, phase: Phase) -> Path:
    return folder / phase.name / checkpoint_name(phase.steps)


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("growth")
    assert run_distributed(train, 2, folder, data) == [[Outcome("finished")] * 4] * 2
    return folder


@pytest.mark.parametrize(("before", "name"), [("base", "moe"), ("moe", "wide"), ("wide", "deep")])
def test_two_workers_grow_as_one_process_does(folder: Path, before: str, name: str) -> None:
    phase = PHASES[name]
    assert phase.growth
    assert phase.source
    source, grown = end(folder, PHASES[before]), CheckpointTensors(folder / name / checkpoint_name(0))
    rules = phase.growth.grow(phase.source).rules
    for parameter, expected in apply_rules(rules, CheckpointTensors(source, "model.")):
        assert torch.equal(grown[f"model.{parameter}"], expected), parameter

    steps, fresh = CheckpointTensors(source, "step."), set()
    for moment in ("exp_avg", "exp_avg_sq"):
        table = moment_rules(rules, moment, "asymmetric" if phase.optimizer_state == "asymmetric" else "copy")
        fresh = rules.keys() - table.keys()
        for parameter, expected in apply_rules(table, CheckpointTensors(source, f"{moment}.")):
            assert torch.equal(grown[f"{moment}.{parameter}"], expected), parameter
            assert grown[f"step.{parameter}"] == steps[table[parameter].sources[0]] > 0, parameter
        for parameter in fresh:
            assert not grown[f"{moment}.{parameter}"].any(), parameter
            assert grown[f"step.{parameter}"] == 0, parameter
    assert any("router" in parameter for parameter in fresh) == (name != "wide")
