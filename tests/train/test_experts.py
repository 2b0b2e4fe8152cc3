"""Training a mixture of experts is the same for any number of workers, and says how its experts are used, and how much
their hidden units do.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raygrow.nn.config import ModelConfig
from raygrow.train.config import OptimizerConfig, PhaseConfig, PlanConfig, ScheduleConfig, TrainConfig
from raygrow.train.loop import Outcome, train_phase
from raygrow.train.optimizer import adamw
from raygrow.train.plan import Phase, resolve
from raygrow.train.session import FolderSession
from raygrow.train.step import expert_figures
from raygrow.weights.shapes import meta_rack
from tests.distributed import run_distributed

MODEL = ModelConfig(
    vocab_size=512,
    d_model=32,
    n_heads=2,
    d_ff=64,
    blocks_per_stack=3,
    max_seq_len=32,
    mlp="relu2",
    mlp_bias=True,
    n_experts=3,
    top_k=2,
    dense_blocks=(1,),
)
TRAIN = TrainConfig(
    seq_len=32,
    batch_size=5,
    micro_batch_size=2,
    report_every=2,
    evaluate_every=20,
    evaluate_sequences=4,
    checkpoint_every=20,
    optimizer=OptimizerConfig(lr=3e-3),
    schedule=ScheduleConfig(warmup_steps=5),
    load_balancing=0.1,
    activation_l1=0.1,
)
PHASE = resolve(PlanConfig(phases={"base": PhaseConfig(steps=20)}), MODEL, TRAIN)[0]


def train(folder: Path, data: Path, phase: Phase, config: TrainConfig) -> Outcome:
    """What each process of a test runs."""
    session = FolderSession(folder)
    return train_phase(phase, config, data=data, seed=0, source=None, session=session, device="cpu")


def run(workers: int, folder: Path, data: Path, config: TrainConfig = TRAIN) -> list[dict[str, Any]]:
    run_distributed(train, workers, folder, data, PHASE, config)
    return FolderSession(folder).records()


@pytest.fixture(scope="module")
def single(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(1, tmp_path_factory.mktemp("single"), data)


def test_two_workers_give_the_losses_and_loads_of_one(single, data: Path, tmp_path: Path) -> None:
    # 5 sequences: 3 in micro-batches of 2 for one worker, 2 and one that only fills up for the other; 3 experts
    records = run(2, tmp_path, data)
    assert len(records) == 10
    keys = "loss", "grad_norm", "balance_loss", "expert_load_max", "expert_load_min", "activation_l1", "active_share"
    for key in keys:
        assert [r[key] for r in records] == pytest.approx([r[key] for r in single], abs=1e-5), key
    assert records[-1]["val_loss"] == pytest.approx(single[-1]["val_loss"], abs=1e-5)


def test_the_loss_falls_and_the_balance_holds(single) -> None:
    assert single[-1]["loss"] < single[0]["loss"] - 0.3
    for record in single:
        assert record["balance_loss"] >= 1
        assert record["expert_load_max"] >= 1 >= record["expert_load_min"] > 0


def test_balancing_evens_out_the_experts(single, data: Path, tmp_path: Path) -> None:
    without = run(1, tmp_path, data, replace(TRAIN, load_balancing=0.0))
    for key in ("balance_loss", "expert_load_max"):  # over all reports: the loads of one step are few numbers
        assert sum(record[key] for record in single) < sum(record[key] for record in without), key


def test_a_weight_on_activations_makes_them_small_and_few(single, data: Path, tmp_path: Path) -> None:
    assert all(0 < record["active_share"] < 1 for record in single)
    phase = replace(PHASE, activation_l1=30.0)
    run_distributed(train, 1, tmp_path, data, phase, TRAIN)
    last = FolderSession(tmp_path).records()[-1]
    assert last["activation_l1"] < 0.5 * single[-1]["activation_l1"]
    assert last["active_share"] < single[-1]["active_share"]


def test_figures_are_of_the_worst_block() -> None:
    load_LE = torch.tensor([[10, 10, 10, 10], [0, 40, 20, 20]])
    assert expert_figures(60.0, load_LE.double(), tokens=20) == {
        "balance_loss": 1.5,
        "expert_load_max": 2.0,
        "expert_load_min": 0.0,
    }


def test_only_matrices_decay() -> None:
    model = meta_rack(MODEL)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decaying, others = adamw(model, TRAIN.optimizer).param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert {names[p].rsplit(".", 2)[-2] for p in decaying["params"]} == set("qkvo") | {"up", "down", "router"} | {
        "embedding",
        "head",
    }
    assert {names[p].rsplit(".", 1)[-1] for p in others["params"]} == {"weight", "bias"}
    assert "blocks.0.mlp.experts.up.bias" in {names[p] for p in others["params"]}
