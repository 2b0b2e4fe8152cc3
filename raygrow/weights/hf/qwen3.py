"""Qwen3: a Llama with QK-norm."""

from typing import Any

from raygrow.nn.config import ModelConfig
from raygrow.weights.hf.family import ALWAYS, DEFAULTS, KEYS, MODULES, QK_NORM_MODULES, Family


def _more_keys(config: ModelConfig) -> dict[str, Any]:
    return {
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": ["full_attention"] * config.n_blocks,
    }


QWEN3 = Family(
    model_type="qwen3",
    title="Qwen3",
    keys=KEYS | {"attention_bias": "attention_bias"},
    defaults=DEFAULTS | {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    always=ALWAYS | {"n_experts": 0, "qk_norm": True, "mlp_bias": False},
    modules=MODULES | QK_NORM_MODULES,
    more_keys=_more_keys,
)
