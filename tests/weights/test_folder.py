"""Model folders: round trips, atomicity, and errors that name the tensor or key."""

import json
import subprocess
import sys

import pytest
import torch

from raygrow.nn.config import ModelConfig
from raygrow.nn.init import init_weights
from raygrow.nn.rack import Rack
from raygrow.weights.folder import load_model, open_folder, write_folder

CONFIG = ModelConfig(
    vocab_size=48, d_model=16, n_heads=2, d_ff=24, n_stacks=2, blocks_per_stack=1, mlp="gelu", norm="layernorm"
)


@pytest.fixture
def rack() -> Rack:
    model = Rack(CONFIG)
    init_weights(model, CONFIG, seed=0)
    return model


def test_round_trip_keeps_config_and_bits(rack, tmp_path):
    write_folder(tmp_path / "model", CONFIG, rack.named_parameters())
    folder = open_folder(tmp_path / "model")
    assert (folder.format, folder.config) == ("raygrow", CONFIG)
    loaded = load_model(tmp_path / "model")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in rack.state_dict().items())
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_dtypes_are_converted_on_request_when_writing_and_when_loading(rack, tmp_path):
    write_folder(tmp_path / "model", CONFIG, rack.named_parameters(), dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in open_folder(tmp_path / "model").tensors.values()} == {torch.bfloat16}
    assert load_model(tmp_path / "model", dtype=torch.float64).head_weight.dtype == torch.float64


def test_tokenizer_files_are_copied(rack, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("stay here")
    write_folder(tmp_path / "model", CONFIG, rack.named_parameters(), tokenizer_from=tmp_path)
    assert (tmp_path / "model/tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "model/notes.txt").exists()


def test_an_existing_folder_is_replaced_only_on_request(rack, tmp_path):
    path = write_folder(tmp_path / "model", CONFIG, rack.named_parameters())
    (path / "notes.txt").write_text("from before")
    with pytest.raises(FileExistsError, match="model exists already"):
        write_folder(path, CONFIG, rack.named_parameters())
    assert (path / "notes.txt").exists()
    write_folder(path, CONFIG, rack.named_parameters(), replace=True)
    assert not (path / "notes.txt").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("norm.bias"), r"'norm\.bias' of the model was not given"),
        (lambda tensors: tensors.update(extra=torch.ones(1)), "'extra' has no place"),
        (lambda tensors: tensors.update({"norm.bias": torch.ones(3)}), r"'norm\.bias' has shape \(3,\).*\(16,\)"),
    ],
)
def test_writing_the_wrong_tensors_is_refused_and_leaves_nothing(rack, tmp_path, change, message):
    tensors = dict(rack.named_parameters())
    change(tensors)
    with pytest.raises(ValueError, match=message):
        write_folder(tmp_path / "model", CONFIG, tensors.items())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"n_stacks": 3}, r"'blocks\.2\.attention_norm\.weight' is missing"),
        ({"n_stacks": 1}, r"'blocks\.1\.[a-z_.]+' has no place"),
        ({"vocab_size": 47}, r"'embedding\.weight' has shape \(48, 16\).*\(47, 16\)"),
        ({"colour": "red"}, r"model\.colour is not a field"),
        ({"mlp": "geglu"}, r"config\.json: mlp='geglu': must be one of swiglu, gelu"),
        ({"attention_mode": "causl"}, r"config\.json: attention_mode='causl': must be one of causal, bidirectional"),
        ({"d_ff": None}, r"config\.json: d_ff=None: must be of type int"),
    ],
)
def test_a_config_that_does_not_fit_the_tensors_is_refused(rack, tmp_path, model, message):
    path = write_folder(tmp_path / "model", CONFIG, rack.named_parameters())
    settings = json.loads((path / "config.json").read_text())
    settings["model"] |= model
    (path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        open_folder(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "raygrow", "mod', "is damaged or cut short"),
        ("\x00\xff", "is damaged or cut short"),
        ("[]", "holds a list where an object"),
        ('{"model_type": "raygrow"}', "model=None: the fields of the model have to be here"),
        ('{"model_type": "raygrow", "model": {}}', "missing .* required"),
    ],
)
def test_a_damaged_config_is_named(rack, tmp_path, content, message):
    path = write_folder(tmp_path / "model", CONFIG, rack.named_parameters())
    (path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"model/config\.json.*{message}"):
        open_folder(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "has no `weight_map`"),
        ('{"weight_map": []}', "has no `weight_map`"),
        ('{"weight_map": {"norm.bias": 1}}', "has no `weight_map`"),
        ('{"weight_map', "cut short"),
    ],
)
def test_a_damaged_index_is_named(rack, tmp_path, content, message):
    path = write_folder(tmp_path / "model", CONFIG, rack.named_parameters(), max_shard_bytes=1000)
    (path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=rf"model\.safetensors\.index\.json.*{message}"):
        open_folder(path)


def test_a_link_to_a_folder_stays_a_link(rack, tmp_path):
    path = write_folder(tmp_path / "model", CONFIG, rack.named_parameters())
    (tmp_path / "link").symlink_to(path)
    write_folder(tmp_path / "link", CONFIG, rack.named_parameters(), replace=True)
    assert (tmp_path / "link").is_symlink()
    assert open_folder(path).config == CONFIG


def test_a_folder_that_is_no_model_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a model folder"):
        open_folder(tmp_path)


FULL_DISK = """
import resource, sys
from raygrow.nn.config import ModelConfig
from raygrow.nn.rack import Rack
from raygrow.weights.folder import write_folder

resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
config = ModelConfig(vocab_size=512, d_model=16, n_heads=2, d_ff=24, blocks_per_stack=1)
try:
    write_folder(sys.argv[1], config, Rack(config).named_parameters())
except OSError as error:
    sys.exit(str(error))
"""


def test_a_file_that_cannot_be_written_out_leaves_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "model")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "model could not be written, nothing is left of it" in done.stderr
    assert not list(tmp_path.iterdir())
