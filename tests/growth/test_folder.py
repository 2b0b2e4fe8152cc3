"""Growing folders: equal to growing in memory, nothing lost on the way, nothing left after a failure."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from raygrow.growth.folder import grow_folder
from raygrow.growth.gstack import Gstack
from raygrow.growth.model import gstack
from raygrow.nn.config import ModelConfig
from raygrow.nn.init import init_weights
from raygrow.nn.rack import Rack
from raygrow.weights.folder import load_model, open_folder, write_folder

TOKENS = torch.randint(0, 64, (2, 13), generator=torch.Generator().manual_seed(0))
OPERATOR = Gstack(factor=2)


@pytest.fixture
def llama_folder(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=7,
    )
    path = tmp_path / "llama"
    LlamaForCausalLM(config).bfloat16().save_pretrained(path, max_shard_size="20KB")
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"my_own_key": {"kept": True}}))
    (path / "tokenizer.json").write_text('{"any": "tokenizer"}')
    return path


@torch.no_grad()
def test_a_grown_hf_folder_loads_in_transformers_and_equals_the_grown_rack(llama_folder, tmp_path):
    assert (llama_folder / "model.safetensors.index.json").exists()
    seen = []
    summary = grow_folder(llama_folder, tmp_path / "grown", OPERATOR, progress=lambda *done: seen.append(done))
    assert summary["n_blocks"] == [2, 4]
    assert seen[-1] == (39, 39, "tensors written")

    llama = LlamaForCausalLM.from_pretrained(tmp_path / "grown", dtype=torch.float32)
    rack = gstack(load_model(llama_folder, dtype=torch.float32), growth_factor=2)
    torch.testing.assert_close(llama(TOKENS).logits, rack(TOKENS), rtol=1e-5, atol=1e-5)
    loaded = load_model(tmp_path / "grown")
    assert loaded.head_weight.dtype == torch.bfloat16
    assert all(torch.equal(loaded.state_dict()[name].float(), tensor) for name, tensor in rack.state_dict().items())


def test_every_other_key_and_file_is_kept(llama_folder, tmp_path):
    grow_folder(llama_folder, tmp_path / "grown", OPERATOR)
    before, after = (json.loads((path / "config.json").read_text()) for path in (llama_folder, tmp_path / "grown"))
    assert after == before | {"num_hidden_layers": 4}
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "grown" / name).read_bytes() == (llama_folder / name).read_bytes()


def test_a_raygrow_folder_stays_one_and_keeps_its_stacks(tmp_path):
    config = ModelConfig(vocab_size=64, d_model=16, n_heads=2, d_ff=24, blocks_per_stack=2, qk_norm=True)
    rack = Rack(config)
    init_weights(rack, config, seed=0)
    write_folder(tmp_path / "base", config, rack.named_parameters())
    grow_folder(tmp_path / "base", tmp_path / "grown", OPERATOR)
    grown, expected = open_folder(tmp_path / "grown"), gstack(rack, growth_factor=2)
    assert (grown.format, grown.config) == ("raygrow", expected.config)
    assert all(torch.equal(grown.tensors[name], tensor) for name, tensor in expected.state_dict().items())


def test_a_missing_tensor_is_named_and_nothing_is_left(llama_folder, tmp_path):
    model = LlamaForCausalLM.from_pretrained(llama_folder)
    model.save_pretrained(tmp_path / "one-file")
    file = tmp_path / "one-file/model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' is missing"):
        grow_folder(tmp_path / "one-file", tmp_path / "grown", OPERATOR)
    assert not (tmp_path / "grown").exists()


def test_an_existing_target_is_not_touched(llama_folder, tmp_path):
    (tmp_path / "grown").mkdir()
    (tmp_path / "grown/mine").write_text("precious")
    with pytest.raises(FileExistsError, match="grown exists already"):
        grow_folder(llama_folder, tmp_path / "grown", OPERATOR)
    assert (tmp_path / "grown/mine").read_text() == "precious"


FULL_DISK = """
import resource, sys
from raygrow.growth.folder import grow_folder
from raygrow.growth.gstack import Gstack

resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
try:
    grow_folder(sys.argv[1], sys.argv[2], Gstack(factor=2))
except OSError as error:
    sys.exit(str(error))
"""


def test_a_disk_that_fills_up_leaves_nothing_under_the_name(llama_folder, tmp_path):
    target = tmp_path / "elsewhere/grown"
    command = [sys.executable, "-c", FULL_DISK, str(llama_folder), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "grown could not be written, nothing is left of it" in done.stderr
    assert not list(target.parent.iterdir())
