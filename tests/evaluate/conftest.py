"""A tiny model with its tokenizer, and data prepared with that tokenizer."""

from pathlib import Path

import numpy as np
import pytest

from raygrow.data.shards import Manifest, ShardWriter, SplitInfo
from raygrow.nn.config import ModelConfig
from raygrow.nn.init import init_weights
from raygrow.nn.rack import Rack
from raygrow.text.tokenizer import Tokenizer, train_tokenizer
from raygrow.weights.folder import write_folder

TEXTS = {
    "train": [f"def f{i}(x):\n    return x + {i}\n" for i in range(60)],
    "validation": [f"def g{i}(y):\n    return y - {i}\n" for i in range(12)],
}


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS["train"], 280)


@pytest.fixture(scope="session")
def config(tokenizer: Tokenizer) -> ModelConfig:
    return ModelConfig(
        vocab_size=tokenizer.vocab_size,
        d_model=32,
        n_heads=4,
        n_kv_heads=2,
        d_ff=48,
        n_stacks=3,
        blocks_per_stack=1,
        max_seq_len=48,
        qk_norm=True,
        n_experts=3,
        top_k=2,
        dense_blocks=(1,),
        init_std=0.3,  # far from uniform, so that greedy tokens differ from step to step
    )


@pytest.fixture(scope="session")
def model(config: ModelConfig) -> Rack:
    model = Rack(config)
    init_weights(model, config, seed=3)
    return model


@pytest.fixture
def model_folder(tmp_path: Path, model: Rack, config: ModelConfig, tokenizer: Tokenizer) -> Path:
    tokenizer.save(tmp_path / "tokenizer")
    tensors = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    return write_folder(tmp_path / "model", config, tensors, tokenizer_from=tmp_path / "tokenizer")


@pytest.fixture
def data(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    splits = {}
    for split, texts in TEXTS.items():
        writer, size = ShardWriter(folder, split, dtype=np.dtype("<u2"), shard_tokens=500), 0
        for ids in tokenizer.encode_batch(texts):
            writer.write(np.array([*ids, tokenizer.eos_id]))
            size += len(ids) + 1
        n_bytes = sum(len(text.encode()) for text in texts)
        splits[split] = SplitInfo(documents=len(texts), bytes=n_bytes, tokens=size, shards=writer.finish())
    Manifest(
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        dtype="<u2",
        splits=splits,
        settings={},
    ).save(folder)
    return folder
