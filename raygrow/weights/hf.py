"""Hugging Face's Llama: its config and tensor names, to and from raygrow's."""

import re
from typing import Any

from raygrow.nn.config import ModelConfig

_MODULES = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
HEAD = "lm_head.weight"
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")

_REQUIRED = ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers")
# what a Llama always is: ModelConfig field -> its value
_ALWAYS = {"mlp": "swiglu", "norm": "rmsnorm", "qk_norm": False, "attention_mode": "causal"}


def hf_name(name: str) -> str:
    """The name that Llama gives the parameter which raygrow calls `name`."""
    if match := _BLOCK.fullmatch(name):
        return f"model.layers.{match[1]}.{_MODULES[match[2]]}.{match[3]}"
    return {
        "embedding.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": HEAD,
    }[name]


def is_derived(name: str, config: ModelConfig) -> bool:
    """Whether a stored tensor says nothing new: rotary tables of old checkpoints, or the head of a tied model."""
    return name.endswith("rotary_emb.inv_freq") or (config.tie_embeddings and name == HEAD)


def from_hf_config(settings: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Llama `config.json`, of transformers 4 (`rope_theta`) or 5 (`rope_parameters`).

    Raises:
        ValueError: If the model is not a Llama, or has something that raygrow's Llama has not.
    """
    if settings.get("model_type") != "llama":
        raise ValueError(f"model_type={settings.get('model_type')!r}: raygrow reads only llama models of Hugging Face")
    if settings.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act={settings['hidden_act']!r}: only silu is supported")
    if settings.get("quantization_config"):
        raise ValueError("quantization_config: quantized checkpoints cannot be read, use the original weights")
    for key in _REQUIRED:
        if settings.get(key) is None:
            raise ValueError(f"{key} is missing from the model's config.json")
    return ModelConfig(
        vocab_size=settings["vocab_size"],
        d_model=settings["hidden_size"],
        n_heads=settings["num_attention_heads"],
        n_kv_heads=settings.get("num_key_value_heads") or 0,
        head_dim=settings.get("head_dim") or 0,
        d_ff=settings["intermediate_size"],
        blocks_per_stack=settings["num_hidden_layers"],
        max_seq_len=settings.get("max_position_embeddings", 2048),
        norm_eps=settings.get("rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(settings),
        attention_bias=settings.get("attention_bias", False),
        mlp_bias=settings.get("mlp_bias", False),
        tie_embeddings=settings.get("tie_word_embeddings", False),
        init_std=settings.get("initializer_range", 0.02),
    )


def to_hf_config(config: ModelConfig, *, eos_id: int | None = None) -> dict[str, Any]:
    """A Llama `config.json` that transformers 4 and 5 both read, but for the dtype of the stored tensors.

    Args:
        config: The model.
        eos_id: Token that ends a text, where known.

    Raises:
        ValueError: If a Llama cannot be such a model; names the field.
    """
    for field, value in _ALWAYS.items():
        if getattr(config, field) != value:
            raise ValueError(
                f"{field}={getattr(config, field)!r}: a Hugging Face Llama always has {field}={value!r}, "
                "so this model can only be written as a raygrow folder"
            )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_blocks,
        "max_position_embeddings": config.max_seq_len,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "bos_token_id": None,  # left out, transformers would take ids that mean something else in this vocabulary
        "eos_token_id": eos_id,
    }


def updated_hf_config(settings: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model made from another: what the new shape changes, and every other key as it was."""
    before, after = to_hf_config(from_hf_config(settings)), to_hf_config(config)
    return settings | {key: value for key, value in after.items() if value != before[key]}


def _rope_theta(settings: dict[str, Any]) -> float:
    # transformers 5 holds theta and scaling in `rope_parameters`, 4 holds theta beside `rope_scaling`; where both are,
    # transformers goes by the older one
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope scaling {kind!r}: only unscaled rotary positions (default) are supported")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor={rope['partial_rotary_factor']}: only whole heads can be rotated")
    return float(rope.get("rope_theta", settings.get("rope_theta", 10_000.0)))
