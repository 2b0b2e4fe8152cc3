"""Growing folders: equal to growing in memory, read once, written once, nothing lost on the way, nothing left after a
failure.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

from raygrow.growth.depth import Depth
from raygrow.growth.experts import Experts
from raygrow.growth.folder import grow_folder
from raygrow.growth.gstack import Gstack
from raygrow.growth.model import grow_model, gstack
from raygrow.growth.width import Width
from raygrow.nn.config import ModelConfig
from raygrow.nn.init import init_weights
from raygrow.nn.rack import Rack
from raygrow.weights.folder import load_model, open_folder, write_folder
from raygrow.weights.safetensors_io import SafetensorsFolder

TOKENS = torch.randint(0, 64, (2, 13), generator=torch.Generator().manual_seed(0))
OPERATOR = Gstack(factor=2)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def llama_folder(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "llama"
    LlamaForCausalLM(LlamaConfig(**SIZES, bos_token_id=7)).bfloat16().save_pretrained(path, max_shard_size="20KB")
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"my_own_key": {"kept": True}}))
    (path / "tokenizer.json").write_text('{"any": "tokenizer"}')
    return path


CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "tied llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 10, "attention_bias": True}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 3}),
    "qwen3_moe": (None, Qwen3MoeForCausalLM, {}),
}
GROWTHS = {
    "deeper": ("llama", Gstack(factor=2), "llama"),
    "deeper by identities": ("llama", Depth(extra_layers=2, source="spread", identity=True), "llama"),
    "wider": ("llama", Width(factor=2), "llama"),
    "wider and untied": ("tied llama", Width(factor=3, untie=True, heads=1), "llama"),
    "with experts": ("llama", Experts(n_experts=4), "mixtral"),
    "with experts, partly redrawn": ("llama", Experts(n_experts=4, drop=0.5), "mixtral"),
    "deeper qwen": ("qwen3", Depth(blocks=(1, 0, 0)), "qwen3"),
    "wider qwen": ("qwen3", Width(heads=2, d_model=1, d_ff=3), "qwen3"),
    "qwen with some experts": ("qwen3", Experts(n_experts=4, blocks=(1,), norm_topk_prob=False), "qwen3_moe"),
    "qwen with experts": ("qwen3", Experts(n_experts=4, top_k=3), "qwen3_moe"),
    "deeper mixture": ("mixtral", Depth(extra_layers=1, identity=True), "mixtral"),
    "wider mixture": ("mixtral", Width(factor=2), "mixtral"),
}


@pytest.mark.parametrize(("family", "operator", "grown_family"), GROWTHS.values(), ids=GROWTHS)
@torch.no_grad()
def test_a_grown_folder_is_the_grown_model_and_opens_in_transformers(family, operator, grown_family, tmp_path):
    config_class, model_class, more = CLASSES[family]
    torch.manual_seed(0)
    source = model_class(config_class(**SIZES, **more)).eval()
    for parameter in source.parameters():  # norms start as ones, which would hide a mix-up
        parameter += 0.02 * torch.randn_like(parameter)
    source.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    assert grow_folder(tmp_path / "source", tmp_path / "grown", operator)["format"] == "hf"
    grow_folder(tmp_path / "source", tmp_path / "own", operator, format="raygrow")

    expected = grow_model(load_model(tmp_path / "source"), operator)
    for folder, format in (("grown", "hf"), ("own", "raygrow")):
        opened = open_folder(tmp_path / folder)
        assert (opened.format, opened.config.regrouped(1)) == (format, expected.config.regrouped(1))
        assert all(torch.equal(opened.tensors[name], tensor) for name, tensor in expected.state_dict().items())

    grown_class = CLASSES[grown_family][1]
    grown, info = grown_class.from_pretrained(tmp_path / "grown", dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    torch.testing.assert_close(grown.eval()(TOKENS).logits, expected(TOKENS), rtol=1e-5, atol=1e-5)
    if operator.grow(open_folder(tmp_path / "source").config).exact:
        torch.testing.assert_close(expected(TOKENS), source(TOKENS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operator", [Gstack(factor=3), Depth(blocks=(0, 1, 0, 0), identity=True), Width(factor=2)])
def test_every_expert_is_read_once(operator, tmp_path, monkeypatch):
    config = ModelConfig(vocab_size=64, d_model=16, n_heads=2, d_ff=24, blocks_per_stack=2, n_experts=3, top_k=2)
    write_folder(tmp_path / "source", config, Rack(config).named_parameters(), format="hf")
    asked, get = [], SafetensorsFolder.__getitem__

    def counted(self, name):
        asked.append(name)
        return get(self, name)

    monkeypatch.setattr(SafetensorsFolder, "__getitem__", counted)
    grow_folder(tmp_path / "source", tmp_path / "grown", operator)
    runs = [name for name, before in zip(asked, [None, *asked], strict=False) if name != before]
    assert len(runs) == len(set(runs)) == len(SafetensorsFolder(tmp_path / "source"))


@torch.no_grad()
def test_dtypes_and_the_number_of_blocks_are_those_of_the_model(llama_folder, tmp_path):
    assert (llama_folder / "model.safetensors.index.json").exists()
    seen = []
    summary = grow_folder(llama_folder, tmp_path / "grown", OPERATOR, progress=lambda *done: seen.append(done))
    assert summary["n_blocks"] == [2, 4]
    assert seen[-1] == (39, 39, "tensors written")
    assert load_model(tmp_path / "grown").head_weight.dtype == torch.bfloat16
    assert LlamaForCausalLM.from_pretrained(tmp_path / "grown", dtype="auto").dtype == torch.bfloat16


def test_every_other_key_and_file_is_kept(llama_folder, tmp_path):
    grow_folder(llama_folder, tmp_path / "grown", OPERATOR)
    before, after = (json.loads((path / "config.json").read_text()) for path in (llama_folder, tmp_path / "grown"))
    assert after == before | {"num_hidden_layers": 4}
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "grown" / name).read_bytes() == (llama_folder / name).read_bytes()


def test_another_family_has_a_config_of_its_own(llama_folder, tmp_path):
    grow_folder(llama_folder, tmp_path / "grown", Experts(n_experts=4))
    config = json.loads((tmp_path / "grown/config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert (config["bos_token_id"], config["dtype"], config["torch_dtype"]) == (7, "bfloat16", "bfloat16")
    assert "my_own_key" not in config
    assert (tmp_path / "grown/tokenizer.json").exists()


def test_a_raygrow_folder_stays_one_and_keeps_its_stacks(tmp_path):
    config = ModelConfig(vocab_size=64, d_model=16, n_heads=2, d_ff=24, blocks_per_stack=2, qk_norm=True)
    rack = Rack(config)
    init_weights(rack, config, seed=0)
    write_folder(tmp_path / "base", config, rack.named_parameters())
    grow_folder(tmp_path / "base", tmp_path / "grown", OPERATOR)
    grown, expected = open_folder(tmp_path / "grown"), gstack(rack, growth_factor=2)
    assert (grown.format, grown.config) == ("raygrow", expected.config)
    assert all(torch.equal(grown.tensors[name], tensor) for name, tensor in expected.state_dict().items())
    grow_folder(tmp_path / "base", tmp_path / "hf", OPERATOR, format="hf")
    assert open_folder(tmp_path / "hf").settings["model_type"] == "qwen3"


@pytest.mark.parametrize(
    ("fields", "operator", "named"),
    [
        ({"mlp": "gelu"}, Experts(), "mlp='gelu': a Hugging Face Mixtral"),
        ({}, Experts(norm_topk_prob=False), "norm_topk_prob=False"),
        ({}, Experts(blocks=(0,)), r"dense_blocks=\(1,\)"),
        ({"tie_embeddings": True}, Width(), r"logit_scale=0\.5.*untie=true"),
        ({}, Width(heads=1, d_model=1, untie=True), "untie=true"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is(fields, operator, named, tmp_path):
    config = ModelConfig(**({"vocab_size": 8, "d_model": 8, "n_heads": 2, "d_ff": 8, "blocks_per_stack": 2} | fields))
    write_folder(tmp_path / "base", config, Rack(config).named_parameters())
    seen = []
    with pytest.raises(ValueError, match=named):
        grow_folder(tmp_path / "base", tmp_path / "new/grown", operator, format="hf", progress=seen.append)
    assert not (tmp_path / "new").exists()
    assert not seen


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


SEVEN_B = ModelConfig(  # Llama 7B with every size but the depth divided by 16
    vocab_size=2000, d_model=256, n_heads=32, d_ff=688, blocks_per_stack=32
)
LARGEST_TENSOR = SEVEN_B.vocab_size * SEVEN_B.d_model * 2
CONSTANT = 12_000_000
DRAWING = 20_000_000  # statistics in fp64 of a part of a tensor
MEASURED = """
import json, resource, sys
from pathlib import Path

from raygrow.growth.depth import Depth
from raygrow.growth.experts import Experts
from raygrow.growth.folder import grow_folder
from raygrow.growth.gstack import Gstack
from raygrow.growth.width import Width
from raygrow.weights.safetensors_io import SafetensorsFolder

tiny, source, target, operator, allowed = sys.argv[1:]
grow_folder(tiny, target + "-tiny", eval(operator))  # loads what is loaded late

asked, get = [], SafetensorsFolder.__getitem__
def counted(self, name):
    tensor = get(self, name)
    if not asked or asked[-1] != (name, tensor.nbytes):
        asked.append((name, tensor.nbytes))
    return tensor
SafetensorsFolder.__getitem__ = counted

def proc(file, key):
    line = next(line for line in Path(f"/proc/self/{file}").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * (1024 if line.endswith("kB") else 1)

# private memory that can be written to; the files of the source are mapped as such
mapped = sum(file.stat().st_size for file in Path(source).glob("*.safetensors"))
resource.setrlimit(resource.RLIMIT_DATA, (proc("status", "VmData") + mapped + int(allowed),) * 2)
read, written = proc("io", "rchar"), proc("io", "wchar")
grow_folder(source, target, eval(operator))
print(json.dumps({"asked": asked, "read": proc("io", "rchar") - read, "written": proc("io", "wchar") - written}))
"""


@pytest.fixture(scope="module")
def seven_b(tmp_path_factory):
    """Folders of a scaled-down Llama 7B and of a tiny one, in several files each."""
    path = tmp_path_factory.mktemp("seven-b")
    torch.manual_seed(0)
    for name, config in (("source", SEVEN_B), ("tiny", ModelConfig(**(vars(SEVEN_B) | {"blocks_per_stack": 1})))):
        with torch.device("meta"):
            shapes = {name: parameter.shape for name, parameter in Rack(config).named_parameters()}
        tensors = ((name, torch.empty(shape, dtype=torch.bfloat16).normal_()) for name, shape in shapes.items())
        write_folder(path / name, config, tensors, format="hf", max_shard_bytes=20_000_000)
    return path


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts bytes and limits memory like this")
@pytest.mark.parametrize(
    ("operator", "allowed"),
    [
        ("Gstack(factor=2)", LARGEST_TENSOR + CONSTANT),
        ("Experts(n_experts=8, top_k=2)", LARGEST_TENSOR + CONSTANT),
        # what is drawn is drawn in fp32, beside what it replaces or is added to
        ("Experts(n_experts=8, top_k=2, drop=0.5)", 4 * LARGEST_TENSOR + CONSTANT + DRAWING),
        ("Width(factor=2)", 4 * 2 * LARGEST_TENSOR + CONSTANT + DRAWING),
    ],
)
def test_a_source_is_read_once_a_target_written_once_and_few_tensors_held(operator, allowed, seven_b, tmp_path):
    folders = [seven_b / "tiny", seven_b / "source", tmp_path / "grown"]
    command = [sys.executable, "-c", MEASURED, *map(str, folders), operator, str(allowed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)

    size = {path: sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in folders}
    headers = 5_000_000
    asked = figures["asked"]
    assert len(asked) == len({name for name, _ in asked}), "a tensor was read again after others"
    assert size[folders[1]] - headers < sum(bytes for _, bytes in asked) <= size[folders[1]]
    assert figures["read"] < headers, "what is not read through the memory map"
    assert size[folders[2]] <= figures["written"] + headers
    assert figures["written"] <= size[folders[2]] + headers
    assert size[folders[2]] > 4 * allowed


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
    assert not target.parent.exists()
