"""Damaged input and full disks: `raygrow` says so in one paragraph, leaves with status 2, and nothing half-written."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from raygrow.data.corpus import FilesCorpus, TokenizerConfig
from raygrow.data.prepare import prepare
from raygrow.nn.config import ModelConfig
from raygrow.nn.init import init_weights
from raygrow.nn.rack import Rack
from raygrow.weights.folder import write_folder
from tests.processes import run_script

RAYGROW = Path(sys.executable).parent / "raygrow"
ROOT = Path(__file__).parents[1]
CONFIG = ModelConfig(vocab_size=300, d_model=16, n_heads=2, d_ff=24, blocks_per_stack=2, max_seq_len=32)
MODEL = [
    *("model.vocab_size=300", "model.d_model=16", "model.n_heads=2", "model.n_kv_heads=2", "model.d_ff=24"),
    *("model.blocks_per_stack=2", "model.max_seq_len=32", "train.seq_len=32"),
]
"""CONFIG, as settings."""
DATA = ["data=files", f"data.files=['{ROOT}/raygrow/n*/*.py']", "data.path=data"]
DATA += ["data.tokenizer.vocab_size=300", "data.validation_share=0.2"]
"""What the data of the tests is prepared with, as settings."""


def failed(here: Path, *words: str, limit: int | None = None) -> str:
    """The one paragraph that a command fails with.

    Args:
        here: Where it runs.
        words: What follows `raygrow`.
        limit: Most bytes that it may write to one file: a disk that is full.
    """
    environment = {key: value for key, value in os.environ.items() if key != "RAYGROW_TRACEBACK"}
    result = run_script(RAYGROW, words, cwd=here, environment=environment, largest_file=limit)
    assert result.returncode == 2, result
    error = result.stderr.splitlines()[-1]
    assert error.startswith("raygrow: "), result.stderr
    assert "Traceback" not in result.stderr
    return error


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` in it, prepared from this project's own source, and `small`, a model that fits it."""
    here = tmp_path_factory.mktemp("prepared")
    corpus = FilesCorpus(
        path=str(here / "data"),
        files=(str(ROOT / "raygrow/n*/*.py"),),
        tokenizer=TokenizerConfig(vocab_size=300),
        validation_share=0.2,
    )
    prepare(corpus)
    model = Rack(CONFIG)
    init_weights(model, CONFIG, seed=0)
    write_folder(here / "small", CONFIG, model.state_dict().items(), tokenizer_from=here / "data/tokenizer")
    return here


@pytest.fixture
def here(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared folder, to break."""
    return shutil.copytree(prepared, tmp_path / "here")


def train(here: Path, *words: str) -> str:
    """How `raygrow train` fails; it never gets as far as a run's folder."""
    error = failed(here, "train", "plan=scratch", *DATA, *MODEL, *words)
    assert not (here / "runs").exists()
    return error


def test_a_shard_that_is_cut_short(here: Path) -> None:
    shard = here / "data/train-00000.bin"
    os.truncate(shard, shard.stat().st_size - 2)
    assert "data/train-00000.bin: this shard has" in train(here)


def test_a_shard_whose_checksum_is_off(here: Path) -> None:
    shard = here / "data/validation-00000.bin"
    content = bytearray(shard.read_bytes())
    content[7] ^= 1
    shard.write_bytes(content)
    assert "data/validation-00000.bin: the checksum is off" in train(here)


def test_a_tokenizer_that_does_not_match(here: Path) -> None:
    tokenizer = here / "small/tokenizer.json"
    settings = json.loads(tokenizer.read_text())
    settings["model"]["merges"].reverse()
    tokenizer.write_text(json.dumps(settings))
    error = train(here, "plan.phases.scratch.init=small")
    assert "the tokenizer of small is not the one that the data was prepared with" in error


@pytest.mark.parametrize("command", ["train", "grow"])
def test_a_missing_tensor(command: str, here: Path) -> None:
    tensors = load_file(here / "small/model.safetensors")
    del tensors["blocks.1.mlp.up.weight"]
    save_file(tensors, here / "small/model.safetensors")
    if command == "train":
        error = train(here, "plan.phases.scratch.init=small")
    else:
        error = failed(here, "grow", "small", "big", "operator=gstack", "factor=2")
    assert "small" in error
    assert "blocks.1.mlp.up.weight" in error
    assert {path.name for path in here.iterdir()} == {"data", "small"}


@pytest.mark.parametrize("command", ["prepare", "grow"])
def test_a_disk_that_fills_up(command: str, here: Path) -> None:
    before = sorted(here.iterdir())
    if command == "prepare":
        corpus = [f"data.files={ROOT}/raygrow/*/*.py", "data.path=new", "data.tokenizer.path=data/tokenizer"]
        error = failed(here, "prepare", "data=files", *corpus, limit=50_000)
        assert "new" in error
    else:
        error = failed(here, "grow", "small", "big", "operator=gstack", "factor=100", limit=50_000)
        assert "big" in error
    assert sorted(here.iterdir()) == before
