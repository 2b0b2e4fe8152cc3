"""A small prepared corpus, and the run that every test here trains: two blocks, stacked into four."""

from pathlib import Path

import pytest

from raygrow.config import RunConfig, WorkersConfig
from raygrow.data.corpus import FilesCorpus, TokenizerConfig
from raygrow.data.prepare import prepare
from raygrow.growth.gstack import Gstack
from raygrow.nn.config import ModelConfig
from raygrow.train.config import OptimizerConfig, PhaseConfig, PlanConfig, ScheduleConfig, TrainConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> FilesCorpus:
    """This project's own source, prepared."""
    corpus = FilesCorpus(
        path=str(tmp_path_factory.mktemp("corpus") / "data"),
        files=(str(ROOT / "raygrow/**/*.py"),),
        tokenizer=TokenizerConfig(vocab_size=512),
        validation_share=0.1,
    )
    prepare(corpus)
    return corpus


@pytest.fixture(scope="session")
def tiny(corpus: FilesCorpus, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of seconds on two workers, with a growth in the middle."""
    return RunConfig(
        name="tiny",
        storage_path=str(tmp_path_factory.mktemp("runs")),
        model=ModelConfig(vocab_size=512, d_model=64, n_heads=2, d_ff=128, blocks_per_stack=4, max_seq_len=64),
        data=corpus,
        plan=PlanConfig(
            phases={"base": PhaseConfig(steps=20), "stacked": PhaseConfig(growth=Gstack(factor=2), steps=20)}
        ),
        train=TrainConfig(
            seq_len=64,
            batch_size=8,
            optimizer=OptimizerConfig(lr=3e-3),
            schedule=ScheduleConfig(warmup_steps=10),
            report_every=5,
            evaluate_every=20,
            evaluate_sequences=16,
            checkpoint_every=10,
        ),
        workers=WorkersConfig(num=2, use_gpu=False),
    )
