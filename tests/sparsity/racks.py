"""Tiny Racks of every kind, with random gains and biases, and texts for them."""

import torch
from torch import Tensor

from raygrow.nn.config import ModelConfig
from raygrow.nn.rack import Rack
from tests.growth.racks import random_rack, tiny

KINDS = {
    "mha": {},
    "gqa": {"n_kv_heads": 2},
    "mqa tied": {"n_kv_heads": 1, "tie_embeddings": True},
    "tied scaled": {"tie_embeddings": True, "logit_scale": 0.5},
    "qk_norm": {"qk_norm": True, "head_dim": 6},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "gelu": {"mlp": "gelu", "mlp_bias": True},
    "reglu": {"mlp": "reglu", "mlp_bias": True},
    "relu2": {"mlp": "relu2"},
    "relu experts": {"mlp": "reglu", "n_experts": 4, "top_k": 2, "d_expert": 20},
    "mixtral": {"n_kv_heads": 2, "n_experts": 4, "top_k": 2, "d_expert": 20},
    "some dense": {
        "blocks_per_stack": 4,
        "n_experts": 3,
        "top_k": 2,
        "dense_blocks": (0, 2),
        "norm_topk_prob": False,
        "qk_norm": True,
        "mlp_bias": True,
        "attention_bias": True,
    },
    "one block": {"blocks_per_stack": 1},
}
TEXT = torch.randint(0, 50, (4, 32), generator=torch.Generator().manual_seed(2))


def tensors(model: Rack) -> dict[str, Tensor]:
    """Parameters by name, as a folder gives them."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def rack(kind: str, dtype: torch.dtype = torch.float64) -> Rack:
    """A Rack of one of the KINDS; nothing in it is at its start."""
    return random_rack(tiny(**KINDS[kind]), dtype)


def config(kind: str) -> ModelConfig:
    return tiny(**KINDS[kind])
