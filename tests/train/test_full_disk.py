"""A checkpoint that finds no room."""

import resource
from pathlib import Path

from raygrow.nn.config import ModelConfig
from raygrow.train.config import PhaseConfig, PlanConfig, TrainConfig
from raygrow.train.loop import Outcome, train_phase
from raygrow.train.plan import resolve
from raygrow.train.session import FolderSession
from tests.distributed import run_distributed

MODEL = ModelConfig(vocab_size=512, d_model=64, n_heads=2, d_ff=128, blocks_per_stack=2, max_seq_len=32)
TRAIN = TrainConfig(seq_len=32, batch_size=2, report_every=1, evaluate_every=10, checkpoint_every=2)
(PHASE,) = resolve(PlanConfig(phases={"base": PhaseConfig(steps=10)}), MODEL, TRAIN)


def train(folder: Path, data: Path, room: int | None) -> Outcome:
    """Trains in a process of its own, where no file may grow beyond `room` bytes."""
    if room:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    session = FolderSession(folder)
    return train_phase(PHASE, TRAIN, data=data, seed=0, source=None, session=session, device="cpu")


def test_the_checkpoint_before_is_kept(tmp_path: Path, data: Path) -> None:
    stop = tmp_path / "STOP"
    stop.touch()
    assert {outcome.status for outcome in run_distributed(train, 2, tmp_path, data, None)} == {"stopped"}
    stop.unlink()

    for outcome in run_distributed(train, 2, tmp_path, data, 100_000):
        assert outcome.status == "failed"
        assert f"base: the checkpoint of step 2 could not be written to {tmp_path}/step-00000002" in outcome.reason
    assert {path.name for path in tmp_path.iterdir()} == {"history.jsonl", "step-00000001"}

    assert run_distributed(train, 2, tmp_path, data, None) == [Outcome("finished")] * 2
    assert [record["step"] for record in FolderSession(tmp_path).records()] == list(range(1, 11))
