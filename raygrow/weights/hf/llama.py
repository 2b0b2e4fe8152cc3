"""Llama: the dense model."""

from raygrow.weights.hf.family import ALWAYS, DEFAULTS, KEYS, MODULES, Family

LLAMA = Family(
    model_type="llama",
    title="Llama",
    keys=KEYS | {"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    defaults=DEFAULTS | {"max_position_embeddings": 2048, "mlp_bias": False},
    always=ALWAYS | {"n_experts": 0, "qk_norm": False},
    modules=MODULES,
)
