"""A tiny model with experts behind the API, and a double in its place."""

from collections.abc import Iterator

import pytest

from raygrow.infer.config import EngineConfig
from raygrow.infer.engine import Engine
from raygrow.nn.config import ModelConfig
from raygrow.nn.init import init_weights
from raygrow.nn.rack import Rack
from raygrow.runtime.openai.app import make_app
from raygrow.text.tokenizer import Tokenizer, train_tokenizer
from tests.runtime.openai.local import Double, LocalModel, served


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["def grow(model, factor):\n    return the model, grown # \u00e4\u00f6\u00fc\n"] * 9, 300)


@pytest.fixture(scope="session")
def rack(tokenizer: Tokenizer) -> Rack:
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        d_model=32,
        n_heads=4,
        n_kv_heads=2,
        d_ff=48,
        n_stacks=2,
        blocks_per_stack=1,
        max_seq_len=1024,
        n_experts=3,
        top_k=2,
        init_std=0.3,  # far from uniform, so that greedy tokens differ from step to step
    )
    model = Rack(config)
    init_weights(model, config, seed=3)
    return model.eval()


@pytest.fixture(scope="session")
def model(rack: Rack, tokenizer: Tokenizer) -> LocalModel:
    return LocalModel("tiny/model", Engine(rack, tokenizer, EngineConfig(max_num_seqs=8)))


@pytest.fixture(scope="session")
def url(model: LocalModel) -> Iterator[str]:
    """Of a real server over a real engine."""
    with served(make_app({model.id: model})) as address:
        yield address


@pytest.fixture(scope="session")
def only_double(tokenizer: Tokenizer) -> Double:
    return Double(tokenizer)


@pytest.fixture
def double(only_double: Double) -> Double:
    """As if it were new."""
    only_double.reset()
    return only_double


@pytest.fixture(scope="session")
def double_url(only_double: Double) -> Iterator[str]:
    """Of a real server over the double."""
    with served(make_app({only_double.id: only_double})) as address:
        yield address
