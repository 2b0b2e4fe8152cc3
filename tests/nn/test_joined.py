"""A model whose projections are joined computes what it did."""

from dataclasses import replace

import pytest
import torch

from raygrow.nn.config import ModelConfig
from raygrow.nn.init import init_weights
from raygrow.nn.joined import JoinedBlock, join
from raygrow.nn.rack import Rack

LLAMA = ModelConfig(
    vocab_size=50, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, blocks_per_stack=2, n_stacks=2, max_seq_len=16
)
MODELS = {
    "llama": LLAMA,
    "biases": replace(LLAMA, attention_bias=True, mlp_bias=True),
    "qk-norm": replace(LLAMA, qk_norm=True),
    "plain mlp": replace(LLAMA, mlp="gelu", n_kv_heads=4),
    "layer norm": replace(LLAMA, norm="layernorm", mlp="reglu"),
    "experts": replace(LLAMA, n_experts=4, top_k=2, dense_blocks=(0,)),
    "adapters": replace(LLAMA, rotation="block"),
}


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_a_joined_model_computes_what_it_did(config: ModelConfig) -> None:
    model = Rack(config).double().requires_grad_(False)
    init_weights(model, config, seed=0)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.normal_(1, 0.1)
    before = model.state_dict()
    for shape in ((2, 7), (1, 1)):  # many tokens, and one alone
        tokens_BT = torch.randint(config.vocab_size, shape)
        logits_BTV = model(tokens_BT)
        joined = Rack(config).double().requires_grad_(False)
        joined.load_state_dict(before)
        join(joined)
        assert all(isinstance(block, JoinedBlock) for block in (*joined.blocks, *joined.stacks[1].blocks))
        torch.testing.assert_close(joined(tokens_BT), logits_BTV, rtol=1e-12, atol=1e-12)
