"""What a family of Hugging Face models is: a table of names. `llama.py` and its neighbours are the tables."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from raygrow.nn.config import ModelConfig

KEYS = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "d_ff": "intermediate_size",
    "blocks_per_stack": "num_hidden_layers",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}
DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "use_sliding_window": False,
}
ACTIVATIONS = {"swiglu": "silu", "reglu": "relu"}
"""Kind of MLP -> hidden_act, in all families: their MLPs are gated."""
ALWAYS = {"norm": "rmsnorm", "attention_mode": "causal", "logit_scale": 1.0}
MODULES = {
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
QK_NORM_MODULES = {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}


@dataclass(frozen=True, kw_only=True)
class Family:
    """The models of one `model_type`."""

    model_type: str
    title: str
    """The beginning of its classes' names."""
    keys: Mapping[str, str]
    """Field of ModelConfig -> key of config.json."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Key that some versions of transformers write -> key of the table."""
    defaults: Mapping[str, Any]
    """Key -> what transformers takes where a config.json does not have it."""
    always: Mapping[str, Any]
    """Field of ModelConfig -> the only value that such a model can have."""
    modules: Mapping[str, str]
    """Module of a Block -> module of a layer; `{expert}` is the number of an expert."""
    more_fields: Callable[[Mapping[str, Any], int], dict[str, Any]] = lambda settings, n_blocks: {}
    """Fields that follow from several keys, of a config.json with all defaults filled in."""
    more_keys: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}
    """Keys that follow from several fields, or say that something is off."""
