"""A model with adapters between its Blocks is saved, loaded, trained and continued like any other."""

import json
from dataclasses import replace

import pytest
import torch

from raygrow.growth.gstack import Gstack
from raygrow.growth.width import Width
from raygrow.infer.config import EngineConfig
from raygrow.infer.engine import Engine
from raygrow.infer.request import Request
from raygrow.infer.sampling import Sampling
from raygrow.nn.config import ModelConfig
from raygrow.nn.init import init_weights
from raygrow.nn.rack import Rack
from raygrow.text.tokenizer import train_tokenizer
from raygrow.weights.folder import load_model, open_folder, write_folder

CONFIG = ModelConfig(
    vocab_size=280,
    d_model=32,
    n_heads=4,
    d_ff=48,
    blocks_per_stack=3,
    max_seq_len=48,
    tie_embeddings=True,
    init_std=0.3,
    rotation="block",
)
TOKENS = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(0))


def rack(config: ModelConfig = CONFIG) -> Rack:
    model = Rack(config)
    init_weights(model, config, seed=0)
    with torch.no_grad():
        for block in model.blocks:
            if isinstance(block.adapter, torch.nn.Linear):
                block.adapter.weight += 0.3 * torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    return model


def test_fresh_adapters_change_nothing():
    plain = Rack(replace(CONFIG, rotation="none"))
    init_weights(plain, plain.config, seed=0)
    adapted = Rack(CONFIG)
    init_weights(adapted, CONFIG, seed=0)
    assert torch.equal(adapted(TOKENS), plain(TOKENS))
    assert adapted.state_dict().keys() - plain.state_dict().keys() == {
        "blocks.0.adapter.weight",
        "blocks.1.adapter.weight",
    }


def test_a_folder_gives_back_every_bit(tmp_path):
    model = rack()
    write_folder(tmp_path / "model", CONFIG, model.named_parameters())
    again = load_model(tmp_path / "model")
    assert again.config == CONFIG
    assert torch.equal(again(TOKENS), model(TOKENS))


def test_a_folder_from_before_there_were_rotations_opens(tmp_path):
    config = replace(CONFIG, rotation="none")
    write_folder(tmp_path / "model", config, Rack(config).named_parameters())
    file = tmp_path / "model/config.json"
    settings = json.loads(file.read_text())
    del settings["model"]["rotation"]
    file.write_text(json.dumps(settings))
    assert open_folder(tmp_path / "model").config == config


def test_the_engine_continues_with_the_tokens_of_the_model():
    model = rack()
    tokens = [3, 1, 4]
    with torch.no_grad():
        for _ in range(20):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    tokenizer = train_tokenizer(["def f(x): return x"] * 4, 280)
    engine = Engine(model, tokenizer, EngineConfig(device="cpu", max_num_seqs=1))
    sampling = Sampling(max_tokens=20, temperature=0.0, ignore_eos=True)
    engine.add(Request(id="a", prompt=(3, 1, 4), sampling=sampling))
    found = []
    while engine.has_work:
        found += [token for delta in engine.step() for token in delta.token_ids]
    engine.close()
    assert found == tokens[3:]


@pytest.mark.parametrize("operator", [Gstack(factor=2), Width(factor=2)])
def test_growth_refuses_adapters(operator):
    with pytest.raises(ValueError, match="a model with adapters between its Blocks grows neither deeper nor wider"):
        operator.grow(CONFIG)
