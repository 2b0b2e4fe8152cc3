"""Qwen3MoE: a Qwen3 whose MLPs, all or some, are mixtures of experts."""

from collections.abc import Mapping
from typing import Any

from raygrow.nn.config import ModelConfig
from raygrow.weights.hf.family import ALWAYS, DEFAULTS, KEYS, MODULES, QK_NORM_MODULES, Family


def _more_fields(settings: Mapping[str, Any], n_blocks: int) -> dict[str, Any]:
    dense, step = settings["mlp_only_layers"] or [], settings["decoder_sparse_step"]
    if not isinstance(dense, list):
        raise ValueError(f"mlp_only_layers={dense!r}: must be a list of layers")
    if type(step) is not int or step < 1:
        raise ValueError(f"decoder_sparse_step={step!r}: must be an integer of at least 1")
    return {"dense_blocks": tuple(i for i in range(n_blocks) if i in dense or (i + 1) % step)}


def _more_keys(config: ModelConfig) -> dict[str, Any]:
    return {
        "mlp_only_layers": list(config.dense_blocks),
        "decoder_sparse_step": 1,
        "use_sliding_window": False,
        "sliding_window": None,
    }


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    title="Qwen3Moe",
    keys=KEYS
    | {
        "attention_bias": "attention_bias",
        "n_experts": "num_experts",
        "top_k": "num_experts_per_tok",
        "d_expert": "moe_intermediate_size",
        "norm_topk_prob": "norm_topk_prob",
    },
    aliases={"num_local_experts": "num_experts"},
    defaults=DEFAULTS
    | {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "norm_topk_prob": False,
        "mlp_only_layers": None,
        "decoder_sparse_step": 1,
    },
    always=ALWAYS | {"qk_norm": True, "mlp_bias": False},
    modules=MODULES
    | QK_NORM_MODULES
    | {
        "mlp.router": "mlp.gate",
        "mlp.experts.gate": "mlp.experts.{expert}.gate_proj",
        "mlp.experts.up": "mlp.experts.{expert}.up_proj",
        "mlp.experts.down": "mlp.experts.{expert}.down_proj",
    },
    more_fields=_more_fields,
    more_keys=_more_keys,
)
