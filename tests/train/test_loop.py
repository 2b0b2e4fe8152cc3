"""Training is the same for any number of workers, across interruptions, and through growth."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from raygrow.growth.gstack import Gstack
from raygrow.nn.config import ModelConfig
from raygrow.nn.init import initial_value
from raygrow.train.checkpoint import CheckpointTensors
from raygrow.train.config import OptimizerConfig, PhaseConfig, PlanConfig, ScheduleConfig, TrainConfig
from raygrow.train.loop import Outcome, train_phase
from raygrow.train.plan import Phase, resolve
from raygrow.train.session import FolderSession
from raygrow.weights.folder import write_folder
from raygrow.weights.shapes import parameter_shapes
from tests.distributed import run_distributed

TARGET = ModelConfig(vocab_size=512, d_model=64, n_heads=4, n_kv_heads=2, d_ff=128, blocks_per_stack=4, max_seq_len=64)
TRAIN = TrainConfig(
    seq_len=64,
    batch_size=6,
    micro_batch_size=2,
    report_every=1,
    evaluate_every=10,
    evaluate_sequences=7,
    checkpoint_every=10,
    optimizer=OptimizerConfig(lr=3e-3),
    schedule=ScheduleConfig(warmup_steps=5),
)
PLAN = PlanConfig(phases={"base": PhaseConfig(steps=20), "stacked": PhaseConfig(steps=10, growth=Gstack(factor=2))})
BASE, STACKED = resolve(PLAN, TARGET, TRAIN)


def train(folder: Path, data: Path, phase: Phase, config: TrainConfig, source: Path | None) -> Outcome:
    """What each process of a test runs."""
    session = FolderSession(folder)
    return train_phase(phase, config, data=data, seed=0, source=source, session=session, device="cpu")


def run(workers: int, folder: Path, data: Path, phase: Phase = BASE, config: TrainConfig = TRAIN, **source: Path):
    """Trains a phase in processes of its own; gives the outcome and the history."""
    outcomes = run_distributed(train, workers, folder, data, phase, config, source.get("source"))
    assert all(outcome == outcomes[0] for outcome in outcomes)
    return outcomes[0], FolderSession(folder).records()


def losses(records: list[dict[str, Any]]) -> list[float]:
    return [record["loss"] for record in records]


@pytest.fixture(scope="module")
def single(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The base phase on one worker, never interrupted."""
    folder = tmp_path_factory.mktemp("single")
    outcome, records = run(1, folder, data)
    assert outcome == Outcome("finished")
    return folder, records


@pytest.fixture(scope="module")
def double(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The base phase on two workers, whose batch of 6 does not divide into their micro-batches of 2."""
    folder = tmp_path_factory.mktemp("double")
    _, records = run(2, folder, data)
    return folder, records


def test_the_loss_falls(single) -> None:
    _, records = single
    assert records[-1]["loss"] < records[0]["loss"] - 0.5


def test_two_workers_give_the_losses_of_one(single, double) -> None:
    assert losses(double[1]) == pytest.approx(losses(single[1]), abs=1e-5)
    assert double[1][-1]["val_loss"] == pytest.approx(single[1][-1]["val_loss"], abs=1e-5)


def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(single, data: Path, tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()  # the session asks for a stop at the first report
    outcome, records = run(1, tmp_path, data)
    assert outcome.status == "stopped"
    assert len(records) == 1
    (tmp_path / "STOP").unlink()
    outcome, records = run(1, tmp_path, data)
    assert outcome.status == "finished"
    timing = ("seconds", "tokens_per_second", "memory_bytes")
    for record, expected in zip(records, single[1], strict=True):
        assert {**record, **dict.fromkeys(timing)} == {**expected, **dict.fromkeys(timing)}


def test_fewer_workers_go_on_with_the_same_samples(double, single, data: Path, tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    run(2, tmp_path, data)
    (tmp_path / "STOP").unlink()
    _, records = run(1, tmp_path, data)
    assert losses(records) == pytest.approx(losses(single[1]), abs=1e-5)


@pytest.fixture(scope="module")
def grown(double, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The stacked phase on two workers, grown from the base that two workers trained."""
    folder = tmp_path_factory.mktemp("grown")
    outcome, records = run(2, folder, data, STACKED, source=double[0] / "step-00000020")
    assert outcome == Outcome("finished")
    return folder, records


def origin(name: str) -> str:
    """The source tensor behind a tensor of the grown checkpoint, spelled out anew."""
    kind, *parts = name.split(".")
    if parts[0] == "blocks":
        parts[1] = str(int(parts[1]) % 2)
    return ".".join((kind, *parts))


def tensor_names(checkpoint: CheckpointTensors) -> list[str]:
    return [name for name in checkpoint if not name.startswith("progress.")]


def test_growth_under_fsdp_copies_weights_moments_and_step(double, grown) -> None:
    base, stacked = CheckpointTensors(double[0] / "step-00000020"), CheckpointTensors(grown[0] / "step-00000000")
    assert {name.split(".")[0] for name in tensor_names(stacked)} == {"model", "exp_avg", "exp_avg_sq", "step"}
    for name in tensor_names(stacked):
        assert torch.equal(stacked[name], base[origin(name)]), name
    assert stacked["step.blocks.3.mlp.up.weight"] == 20


def test_growth_is_verified_and_recorded(double, grown) -> None:
    verification = json.loads((grown[0] / "growth.json").read_text())
    assert verification["passed"]
    assert verification["loss_before"] == pytest.approx(double[1][-1]["val_loss"], abs=1e-5)
    assert grown[1][0]["tokens"] == BASE.tokens + STACKED.step_tokens
    assert grown[1][0]["flops"] == pytest.approx(BASE.flops + STACKED.step_tokens * STACKED.flops_per_token)


def test_growth_on_one_worker_equals_growth_on_two(double, grown, data: Path, tmp_path: Path) -> None:
    _, records = run(1, tmp_path, data, STACKED, source=double[0] / "step-00000020")
    assert losses(records) == pytest.approx(losses(grown[1]), abs=1e-5)


def test_dropped_optimizer_state_starts_at_zero(double, data: Path, tmp_path: Path) -> None:
    run(1, tmp_path, data, replace(STACKED, optimizer_state="drop"), source=double[0] / "step-00000020")
    base, stacked = CheckpointTensors(double[0] / "step-00000020"), CheckpointTensors(tmp_path / "step-00000000")
    for name in tensor_names(stacked):
        expected = base[origin(name)] if name.startswith("model.") else torch.zeros_like(stacked[name])
        assert torch.equal(stacked[name], expected), name


def test_a_growth_that_costs_too_much_loss_ends_the_phase(double, data: Path, tmp_path: Path) -> None:
    strict = replace(STACKED, max_loss_jump=-1.0)
    outcome, records = run(1, tmp_path, data, strict, source=double[0] / "step-00000020")
    assert outcome.status == "failed"
    assert "max_loss_jump=-1" in outcome.reason
    assert not records


def test_a_diverged_loss_ends_the_phase_and_keeps_the_last_checkpoint(data: Path, tmp_path: Path) -> None:
    # so strict a limit takes ordinary noise for divergence, while a checkpoint is still being written
    outcome, records = run(1, tmp_path, data, BASE, replace(TRAIN, checkpoint_every=1, diverged_above=1e-3))
    assert outcome.status == "failed"
    assert "diverged_above=0.001" in outcome.reason
    assert f"step {len(records) + 1}" in outcome.reason
    checkpoints = sorted(tmp_path.glob("step-*"))
    assert [int(folder.name[-8:]) for folder in checkpoints] == [record["step"] for record in records]
    assert all((folder / "DONE").exists() for folder in checkpoints)


def test_a_loss_that_is_not_a_number_ends_the_phase(data: Path, tmp_path: Path) -> None:
    outcome, _ = run(1, tmp_path, data, replace(BASE, lr=1e30))
    assert outcome.status == "failed"
    assert "nan" in outcome.reason


def test_a_phase_with_init_starts_from_that_folder_even_after_another(double, data: Path, tmp_path: Path) -> None:
    other = BASE.model
    weights = {name: initial_value(name, shape, other, 9) for name, shape in parameter_shapes(other).items()}
    folder = write_folder(tmp_path / "other", other, weights.items(), dtype=torch.bfloat16)
    plan = PlanConfig(phases={"base": PhaseConfig(steps=20), "again": PhaseConfig(steps=2, init=str(folder))})
    again = resolve(plan, other, TRAIN)[1]
    run(1, tmp_path / "run", data, again, source=double[0] / "step-00000020")
    started = CheckpointTensors(tmp_path / "run" / "step-00000000")
    for name, weight in weights.items():
        assert torch.equal(started[f"model.{name}"], weight.bfloat16().float()), name
    assert not started["exp_avg.norm.weight"].any()


def test_growth_from_a_hugging_face_folder(data: Path, tmp_path: Path) -> None:
    weights = {name: initial_value(name, shape, BASE.model, 9) for name, shape in parameter_shapes(BASE.model).items()}
    folder = write_folder(tmp_path / "llama", BASE.model, weights.items(), format="hf", dtype=torch.bfloat16)
    plan = PlanConfig(phases={"grown": PhaseConfig(steps=2, init=str(folder), growth=Gstack(factor=2))})
    outcome, _ = run(2, tmp_path / "run", data, resolve(plan, TARGET, TRAIN)[0])
    assert outcome.status == "finished"
    grown = CheckpointTensors(tmp_path / "run" / "step-00000000")
    expected = weights["blocks.1.mlp.up.weight"].bfloat16().float()
    assert torch.equal(grown["model.blocks.3.mlp.up.weight"], expected)
    assert json.loads((tmp_path / "run" / "growth.json").read_text())["passed"]


def test_a_checkpoint_of_another_model_is_named(single, data: Path, tmp_path: Path) -> None:
    shutil.copytree(single[0] / "step-00000020", tmp_path / "step-00000020")
    wider = replace(BASE, model=replace(BASE.model, d_ff=256))
    with pytest.raises(Exception, match=r"has 'model\.blocks\.0\.mlp\.gate\.weight' in shape .*: another model\?"):
        run(1, tmp_path, data, wider)


def test_frozen_parameters_stay_as_they_were(data: Path, tmp_path: Path) -> None:
    phase = replace(BASE, steps=10, frozen=("blocks.0.*", "embedding.*"))
    run(1, tmp_path, data, phase)
    weights = CheckpointTensors(tmp_path / "step-00000010")
    for name in ("blocks.0.mlp.up.weight", "embedding.weight", "blocks.1.mlp.up.weight"):
        stored = weights[f"model.{name}"]
        unchanged = torch.equal(stored, initial_value(name, stored.shape, phase.model, 0))
        assert unchanged == (not name.startswith("blocks.1")), name
    assert "exp_avg.embedding.weight" not in weights


@pytest.mark.parametrize("compile", ["off", pytest.param("on", marks=pytest.mark.slow)])
def test_activation_checkpointing_and_compile_change_no_loss(
    single, data: Path, tmp_path: Path, compile: Literal["off", "on"]
) -> None:
    config = replace(TRAIN, activation_checkpointing=True, compile=compile)
    _, records = run(1, tmp_path, data, replace(BASE, steps=5), config)
    assert losses(records)[:4] == pytest.approx(losses(single[1])[:4], abs=1e-5)
