"""Raygrow's Llama against transformers': same function, same tensors, both ways."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from raygrow.nn.config import ModelConfig
from raygrow.nn.init import init_weights
from raygrow.nn.rack import Rack
from raygrow.weights.folder import load_model, open_folder, write_folder
from raygrow.weights.hf.config import from_hf_config, to_hf_config, updated_hf_config

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMAS = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "odd sizes": {"vocab_size": 61, "hidden_size": 42, "intermediate_size": 37, "num_attention_heads": 3},
    # transformers 4 takes the one spelling of theta, 5 the other
    "own head_dim": {
        "head_dim": 10,
        "rope_theta": 500.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "biases": {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3},
}
TOKENS = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(0))


def random_llama(**settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(SMALL | settings))).eval()
    with torch.no_grad():  # norms and biases start as ones and zeros, which would hide a mix-up
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("settings", LLAMAS.values(), ids=LLAMAS)
@torch.no_grad()
def test_import_computes_what_transformers_computes_and_export_gives_back_every_bit(settings, tmp_path):
    llama = random_llama(**settings)
    llama.save_pretrained(tmp_path / "hf")
    rack = load_model(tmp_path / "hf")
    torch.testing.assert_close(rack(TOKENS), llama(TOKENS).logits, rtol=1e-5, atol=1e-5)

    write_folder(tmp_path / "again", rack.config, rack.named_parameters(), format="hf")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "again")
    assert again.state_dict().keys() == llama.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in llama.state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_rack_exports_to_transformers_and_back_bit_identical(tied, tmp_path):
    config = ModelConfig(
        vocab_size=61, d_model=32, n_heads=4, n_kv_heads=2, d_ff=40, blocks_per_stack=3, tie_embeddings=tied
    )
    rack = Rack(config)
    init_weights(rack, config, seed=1)
    write_folder(tmp_path / "hf", config, rack.named_parameters(), format="hf")
    llama = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    torch.testing.assert_close(llama(TOKENS).logits, rack(TOKENS), rtol=1e-5, atol=1e-5)

    llama.save_pretrained(tmp_path / "saved")
    back = load_model(tmp_path / "saved")
    assert back.config == config
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in rack.state_dict().items())


def test_old_and_new_spelling_of_rope_theta():
    old = {**SMALL, "model_type": "llama", "rope_theta": 5e5, "rope_scaling": None}
    new = {**SMALL, "model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert from_hf_config(old) == from_hf_config(new)
    assert from_hf_config(old).rope_theta == 5e5


def test_of_two_rope_settings_the_one_that_transformers_takes():
    both = {
        "rope_scaling": {"rope_type": "default", "rope_theta": 5e5},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert from_hf_config({**SMALL, "model_type": "llama", **both}).rope_theta == 5e5
    assert LlamaConfig(**SMALL, **both).rope_parameters["rope_theta"] == 5e5


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mamba"}, "model_type='mamba'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope scaling 'llama3'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"intermediate_size": None}, "intermediate_size is missing"),
        ({"rms_norm_eps": "small"}, "norm_eps='small'"),
    ],
)
def test_what_raygrow_cannot_read_is_named(change, named):
    with pytest.raises(ValueError, match=named):
        from_hf_config({**SMALL, "model_type": "llama", **change})


def test_a_key_that_is_not_there_is_named():
    settings = {"model_type": "llama", **SMALL}
    del settings["intermediate_size"]
    with pytest.raises(ValueError, match="intermediate_size is missing"):
        from_hf_config(settings)


@pytest.mark.parametrize(
    ("field", "value"),
    [("mlp", "gelu"), ("norm", "layernorm"), ("attention_mode", "bidirectional"), ("logit_scale", 0.5)],
)
def test_what_llama_cannot_express_is_named(field, value, tmp_path):
    config = ModelConfig(vocab_size=8, d_model=8, n_heads=2, d_ff=8, blocks_per_stack=1, **{field: value})
    with pytest.raises(ValueError, match=f"{field}="):
        write_folder(tmp_path / "model", config, Rack(config).named_parameters(), format="hf")
    assert not list(tmp_path.iterdir())


def test_only_what_the_new_shape_changes_is_written_to_a_config():
    settings = {**SMALL, "model_type": "llama", "torch_dtype": "float16", "rope_theta": 1e4, "my_own_key": [1]}
    deeper = from_hf_config({**settings, "num_hidden_layers": 6})
    assert updated_hf_config(settings, deeper) == {**settings, "num_hidden_layers": 6}


def test_the_written_config_is_plain_json():
    config = ModelConfig(vocab_size=8, d_model=8, n_heads=2, d_ff=8, blocks_per_stack=1)
    assert from_hf_config(json.loads(json.dumps(to_hf_config(config)))) == config


def test_rotary_tables_and_a_tied_head_in_old_checkpoints_are_passed_over(tmp_path):
    from safetensors.torch import load_file, save_file

    random_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert "head.weight" not in open_folder(tmp_path).tensors
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"tie_word_embeddings=true, but lm_head\.weight is stored"):
        open_folder(tmp_path)
