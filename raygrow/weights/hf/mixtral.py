"""Mixtral: a Llama whose every MLP is a mixture of experts (arXiv 2401.04088)."""

from raygrow.weights.hf.family import ALWAYS, DEFAULTS, KEYS, MODULES, Family

_MODULES = {name: module for name, module in MODULES.items() if not name.startswith("mlp.")}

MIXTRAL = Family(
    model_type="mixtral",
    title="Mixtral",
    # no Block is dense: the one size is that of an expert, and is read as d_ff too
    keys=KEYS | {"d_expert": "intermediate_size", "n_experts": "num_local_experts", "top_k": "num_experts_per_tok"},
    aliases={"num_experts": "num_local_experts"},
    defaults=DEFAULTS
    | {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "use_sliding_window": True,
    },
    always=ALWAYS
    | {
        "qk_norm": False,
        "attention_bias": False,
        "mlp_bias": False,
        "norm_topk_prob": True,
        "dense_blocks": (),
    },
    modules=_MODULES
    | {
        "mlp.router": "block_sparse_moe.gate",
        "mlp.experts.gate": "block_sparse_moe.experts.{expert}.w1",
        "mlp.experts.up": "block_sparse_moe.experts.{expert}.w3",
        "mlp.experts.down": "block_sparse_moe.experts.{expert}.w2",
    },
    more_keys=lambda config: {"sliding_window": None},
)
