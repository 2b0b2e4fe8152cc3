"""Raygrow's models against those of transformers: same function, same tensors, both ways, in every family."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from raygrow.nn.config import ModelConfig
from raygrow.nn.init import init_weights
from raygrow.nn.rack import Rack
from raygrow.weights.folder import load_model, open_folder, write_folder
from raygrow.weights.hf.config import from_hf_config, to_hf_config, updated_hf_config

TRANSFORMERS = int(transformers.__version__.partition(".")[0])
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_key_value_heads": 2, "num_local_experts": 4}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"num_key_value_heads": 2, "head_dim": 8}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "norm_topk_prob": True,
        },
    ),
}
MIXTRAL = FAMILIES["mixtral"][2] | {"model_type": "mixtral"}
QWEN3 = FAMILIES["qwen3"][2] | {"model_type": "qwen3"}
QWEN3_MOE = FAMILIES["qwen3_moe"][2] | {"model_type": "qwen3_moe"}
MODELS = {
    "llama mha": ("llama", {}),
    "llama gqa": ("llama", {"num_key_value_heads": 2}),
    "llama mqa tied": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama odd sizes": (
        "llama",
        {"vocab_size": 61, "hidden_size": 42, "intermediate_size": 37, "num_attention_heads": 3},
    ),
    # transformers 4 takes the one spelling of theta, 5 the other
    "llama own head_dim": (
        "llama",
        {
            "head_dim": 10,
            "rope_theta": 500.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3}),
    "llama relu": ("llama", {"hidden_act": "relu"}),
    "mixtral": ("mixtral", {}),
    "mixtral relu": ("mixtral", {"hidden_act": "relu"}),
    "mixtral tied": ("mixtral", {"tie_word_embeddings": True, "num_experts_per_tok": 3, "head_dim": 10}),
    "qwen3": ("qwen3", {}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 12}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe softmax first": ("qwen3_moe", {"norm_topk_prob": False, "tie_word_embeddings": True}),
    "qwen3_moe some dense": (
        "qwen3_moe",
        {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "attention_bias": True},
    ),
}
TOKENS = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(0))


def random_model(family: str = "llama", **settings):
    config_class, model_class, more = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**(SMALL | more | settings))).eval()
    with torch.no_grad():  # norms and biases start as ones and zeros, which would hide a mix-up
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def opened(path, family: str, dtype: torch.dtype = torch.float32):
    """The folder in transformers, which must find what it looks for and nothing else."""
    model, info = FAMILIES[family][1].from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@pytest.mark.parametrize(("family", "settings"), MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_import_computes_what_transformers_computes_and_export_gives_back_every_bit(family, settings, tmp_path):
    model = random_model(family, **settings)
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert (tmp_path / "hf/model.safetensors.index.json").exists()
    rack = load_model(tmp_path / "hf")
    torch.testing.assert_close(rack(TOKENS), model(TOKENS).logits, rtol=1e-5, atol=1e-5)

    write_folder(tmp_path / "again", rack.config, rack.named_parameters(), format="hf", max_shard_bytes=30_000)
    assert (tmp_path / "again/model.safetensors.index.json").exists()
    again = opened(tmp_path / "again", family)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_rack_exports_to_transformers_and_back_bit_identical(family, tied, tmp_path):
    experts = {"n_experts": 4, "top_k": 2} if family in ("mixtral", "qwen3_moe") else {}
    config = ModelConfig(
        vocab_size=61,
        d_model=32,
        n_heads=4,
        n_kv_heads=2,
        d_ff=40,
        blocks_per_stack=3,
        rope_theta=5e5,
        norm_eps=3e-6,
        max_seq_len=99,
        tie_embeddings=tied,
        qk_norm=family.startswith("qwen3"),
        **experts,
    )
    rack = Rack(config)
    init_weights(rack, config, seed=1)
    write_folder(tmp_path / "hf", config, rack.named_parameters(), format="hf")
    model = opened(tmp_path / "hf", family)
    torch.testing.assert_close(model(TOKENS).logits, rack(TOKENS), rtol=1e-5, atol=1e-5)

    model.save_pretrained(tmp_path / "saved")
    back = load_model(tmp_path / "saved")
    assert back.config == config
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in rack.state_dict().items())


@pytest.mark.skipif(TRANSFORMERS < 5, reason="transformers 4 never fuses experts")
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@torch.no_grad()
def test_experts_that_are_stored_fused_are_the_same_experts(family, tmp_path):
    model = random_model(family)
    model.save_pretrained(tmp_path / "apart")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    names = load_file(tmp_path / "fused/model.safetensors").keys()
    assert "model.layers.1.mlp.experts.gate_up_proj" in names
    apart, fused = open_folder(tmp_path / "apart").tensors, open_folder(tmp_path / "fused").tensors
    assert list(fused) == list(apart)
    assert all(torch.equal(fused[name], tensor) for name, tensor in apart.items())


def test_a_converted_model_is_opened_in_its_new_dtype(tmp_path):
    random_model().save_pretrained(tmp_path / "hf")
    source = open_folder(tmp_path / "hf")
    converted = {"format": "hf", "settings": source.settings, "dtype": torch.bfloat16}
    write_folder(tmp_path / "half", source.config, source.tensors.items(), **converted)
    assert FAMILIES["llama"][1].from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16


def test_old_and_new_spelling_of_rope_theta():
    old = {**SMALL, "model_type": "llama", "rope_theta": 5e5, "rope_scaling": None}
    new = {**SMALL, "model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert from_hf_config(old) == from_hf_config(new)
    assert from_hf_config(old).rope_theta == 5e5


@pytest.mark.skipif(TRANSFORMERS < 5, reason="transformers 4 knows one of them only")
def test_of_two_rope_settings_the_one_that_transformers_takes():
    both = {
        "rope_scaling": {"rope_type": "default", "rope_theta": 5e5},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert from_hf_config({**SMALL, "model_type": "llama", **both}).rope_theta == 5e5
    assert LlamaConfig(**SMALL, **both).rope_parameters["rope_theta"] == 5e5


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_both_spellings_of_the_number_of_experts(family, key):
    sizes = {"num_key_value_heads": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 20, key: 6}
    assert from_hf_config({**SMALL, "model_type": family, **sizes}).n_experts == 6


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_that_are_not_there_mean_what_they_mean_in_transformers(family):
    sizes = {**SMALL, "hidden_size": 64, "num_attention_heads": 32}
    if family == "mixtral":
        sizes |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    if family == "qwen3_moe":
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
    full = json.loads(FAMILIES[family][0](**sizes).to_json_string(use_diff=False))
    assert len(full) > 20
    assert from_hf_config({"model_type": family, **sizes}) == from_hf_config(full)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mamba"}, "model_type='mamba': .* llama, mixtral, qwen3, qwen3_moe"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope scaling 'llama3'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"intermediate_size": None}, "intermediate_size is missing"),
        ({"rms_norm_eps": "small"}, r"norm_eps='small': must be of type float \(here norm_eps is rms_norm_eps\)"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "num_experts_per_tok is missing"),
        ({"model_type": "qwen3"}, r"n_kv_heads=32 \(here .*, n_kv_heads is num_key_value_heads\)"),
        (
            {**MIXTRAL, "num_experts_per_tok": 2, "sliding_window": 512},
            "sliding_window=512 is less than max_",
        ),
        ({**QWEN3, "sliding_window": 512, "use_sliding_window": True}, "sliding_window=512"),
        ({**QWEN3_MOE, "decoder_sparse_step": 0}, "decoder_sparse_step=0"),
        ({**QWEN3_MOE, "mlp_only_layers": 1}, "mlp_only_layers=1"),
        ({**QWEN3_MOE, "num_experts": True}, "n_experts=True"),
        ({**QWEN3_MOE, "model_type": ["qwen3_moe"]}, "model_type="),
        ({**QWEN3_MOE, "rope_scaling": [1]}, r"rope_scaling or rope_parameters=\[1\]"),
        ({**QWEN3_MOE, "rope_theta": None}, "rope_theta=None"),
        ({**QWEN3_MOE, "mlp_only_layers": [0, 1]}, r"dense_blocks=\[0, 1\]: .* not all"),
        (
            {**MIXTRAL, "num_experts_per_tok": 3, "num_local_experts": 2},
            "top_k=3: must be from 1 to n_experts=2",
        ),
    ],
)
def test_what_raygrow_cannot_read_is_named(change, named):
    with pytest.raises(ValueError, match=named):
        from_hf_config({**SMALL, "model_type": "llama", **change})


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "llama", "sliding_window": 512},
        {**QWEN3, "sliding_window": 512, "use_sliding_window": False},
        {**QWEN3, "sliding_window": 32768, "use_sliding_window": True},
        {**MIXTRAL, "num_experts_per_tok": 2, "sliding_window": 131072},
    ],
)
def test_a_window_that_hides_nothing_is_no_matter(change):
    from_hf_config({**SMALL, **change})


def test_a_key_that_is_not_there_is_named():
    settings = {"model_type": "llama", **SMALL}
    del settings["intermediate_size"]
    with pytest.raises(ValueError, match="intermediate_size is missing"):
        from_hf_config(settings)


EXPERTS = {"n_experts": 4, "top_k": 2}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"mlp": "gelu"}, "mlp='gelu': a Hugging Face Llama has mlp='swiglu' or 'reglu'"),
        ({"mlp": "relu2"}, "mlp='relu2': .* only be written as a raygrow folder"),
        ({"norm": "layernorm"}, "norm='layernorm'"),
        ({"attention_mode": "bidirectional"}, "attention_mode='bidirectional'"),
        ({"logit_scale": 0.5}, r"logit_scale=0\.5: .* untie=true"),
        ({"n_heads": 3, "head_dim": 4}, "d_model=8 is not a multiple of n_heads=3"),
        ({"qk_norm": True, "mlp_bias": True}, "mlp_bias=True: a Hugging Face Qwen3 "),
        ({"rotation": "block"}, "rotation='block': a Hugging Face Llama has no place for adapters"),
        ({**EXPERTS, "mlp": "gelu"}, "mlp='gelu': a Hugging Face Mixtral "),
        ({**EXPERTS, "mlp_bias": True}, "mlp_bias=True"),
        ({**EXPERTS, "attention_bias": True}, "attention_bias=True"),
        ({**EXPERTS, "norm_topk_prob": False}, "norm_topk_prob=False: .* QK-norm"),
        ({**EXPERTS, "dense_blocks": (1,)}, r"dense_blocks=\(1,\): .* QK-norm"),
        ({**EXPERTS, "qk_norm": True, "mlp_bias": True}, "mlp_bias=True: a Hugging Face Qwen3Moe "),
    ],
)
def test_what_no_family_can_hold_is_named_and_nothing_is_written(fields, named, tmp_path):
    config = ModelConfig(**({"vocab_size": 8, "d_model": 8, "n_heads": 2, "d_ff": 8, "blocks_per_stack": 2} | fields))
    with pytest.raises(ValueError, match=named):
        write_folder(tmp_path / "model", config, Rack(config).named_parameters(), format="hf")
    assert not list(tmp_path.iterdir())


def test_only_what_the_new_shape_changes_is_written_to_a_config():
    settings = {**SMALL, "model_type": "llama", "torch_dtype": "float16", "rope_theta": 1e4, "my_own_key": [1]}
    deeper = from_hf_config({**settings, "num_hidden_layers": 6})
    assert updated_hf_config(settings, deeper) == {**settings, "num_hidden_layers": 6}


def test_what_is_said_in_several_keys_changes_in_all_of_them():
    settings = json.loads(random_model("qwen3").config.to_json_string(use_diff=False))
    deeper = from_hf_config({**settings, "num_hidden_layers": 3})
    assert updated_hf_config(settings, deeper)["layer_types"] == ["full_attention"] * 3

    mixed = {**SMALL, **FAMILIES["qwen3_moe"][2], "model_type": "qwen3_moe", "router_aux_loss_coef": 0.5}
    mixed |= {"num_hidden_layers": 4, "decoder_sparse_step": 2}
    config = from_hf_config(mixed)
    assert config.dense_blocks == (0, 2)
    deeper = ModelConfig(**(vars(config) | {"blocks_per_stack": 5}))  # the last one twice: block 4 has experts
    updated = updated_hf_config(mixed, deeper)
    assert from_hf_config(updated) == deeper
    assert updated["router_aux_loss_coef"] == 0.5


def test_another_family_keeps_the_ids_of_special_tokens_only():
    settings = {**SMALL, "model_type": "llama", "my_own_key": [1], "bos_token_id": 7, "eos_token_id": [8, 9]}
    mixture = ModelConfig(**(vars(from_hf_config(settings)) | EXPERTS))
    updated = updated_hf_config(settings, mixture)
    assert updated == to_hf_config(mixture) | {"bos_token_id": 7, "eos_token_id": [8, 9]}
    assert (updated["model_type"], updated["architectures"]) == ("mixtral", ["MixtralForCausalLM"])


@pytest.mark.parametrize("fields", [{}, EXPERTS, {"qk_norm": True}, {**EXPERTS, "qk_norm": True, "dense_blocks": (0,)}])
def test_the_written_config_is_plain_json(fields):
    config = ModelConfig(vocab_size=8, d_model=8, n_heads=2, d_ff=8, blocks_per_stack=2, **fields)
    assert from_hf_config(json.loads(json.dumps(to_hf_config(config)))) == config


def test_rotary_tables_and_a_tied_head_in_old_checkpoints_are_passed_over(tmp_path):
    random_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert "head.weight" not in open_folder(tmp_path).tensors
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"tie_word_embeddings=true, but lm_head\.weight is stored"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.3.w2.weight"),
            r"experts\.3\.w2.* missing",
        ),
        (
            lambda tensors: tensors.update({"model.layers.1.block_sparse_moe.experts.4.w1.weight": torch.ones(48, 32)}),
            r"experts\.4\.w1.* has no place",
        ),
        (
            lambda tensors: tensors.update({"model.layers.0.block_sparse_moe.experts.0.w1.weight": torch.ones(9, 32)}),
            r"experts\.0\.w1.* has shape \(9, 32\).*\(48, 32\)",
        ),
    ],
)
def test_an_expert_that_is_missing_too_many_or_of_another_shape_is_named(change, named, tmp_path):
    random_model("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=named):
        open_folder(tmp_path)
