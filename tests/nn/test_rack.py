"""The model computes what its parts say, and costs what nn/cost.py predicts."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from raygrow.nn import cost
from raygrow.nn.attention import full_attention
from raygrow.nn.config import ModelConfig
from raygrow.nn.init import init_weights
from raygrow.nn.rack import Rack

BASE: dict = {"vocab_size": 97, "d_model": 48, "n_heads": 4, "d_ff": 80, "n_stacks": 2, "blocks_per_stack": 2}
VARIANTS = {
    "plain": {},
    "gqa": {"n_kv_heads": 2},
    "tied": {"tie_embeddings": True},
    "gelu": {"mlp": "gelu", "norm": "layernorm"},
    "biases": {"attention_bias": True, "mlp_bias": True, "mlp": "gelu"},
    "qk_norm": {"qk_norm": True, "head_dim": 16},
    "bidirectional": {"attention_mode": "bidirectional"},
    "logit_scale": {"logit_scale": 0.5, "tie_embeddings": True},
    "experts": {"n_experts": 4, "top_k": 2},
    "plain_experts": {"n_experts": 3, "top_k": 1, "d_expert": 40, "mlp": "gelu", "mlp_bias": True},
    "some_experts": {"n_experts": 5, "top_k": 2, "norm_topk_prob": False, "dense_blocks": (0, 2)},
    "adapters": {"rotation": "block", "n_experts": 3, "top_k": 2, "dense_blocks": (1,)},
}


# torch does not know the operators of the twin: every row has one product, and two in the backward pass
GROUPED_FLOPS = {
    torch.ops.raygrow.grouped_mm_twin: lambda x, weight, *_, **__: 2 * x[0] * weight[1] * weight[2],
    torch.ops.raygrow.grouped_mm_twin_backward: lambda grad, x, weight, *_, **__: 4 * x[0] * weight[1] * weight[2],
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request: pytest.FixtureRequest) -> Rack:
    config = ModelConfig(**BASE, **request.param)
    rack = Rack(config)
    init_weights(rack, config, seed=0)
    return rack


def test_parameters_are_as_predicted(model: Rack) -> None:
    assert sum(parameter.numel() for parameter in model.parameters()) == cost.parameters(model.config)


def test_a_token_goes_through_the_parameters_that_are_called_active(model: Rack) -> None:
    c = model.config
    share = {True: c.top_k / c.n_experts if c.n_experts else 1.0, False: 1.0}
    counted = sum(share[".experts." in name] * parameter.numel() for name, parameter in model.named_parameters())
    assert cost.active_parameters(c) == pytest.approx(counted)


def test_logits_are_scaled() -> None:
    config = ModelConfig(**BASE)
    plain, scaled = Rack(config), Rack(replace(config, logit_scale=0.25))
    scaled.load_state_dict(plain.state_dict())
    tokens = torch.randint(0, 97, (1, 5))
    torch.testing.assert_close(scaled(tokens), 0.25 * plain(tokens))


def test_training_flops_are_those_that_torch_counts(model: Rack) -> None:
    # torch counts attention scores in full, we the causal half: compare without the causal mask
    model.attend = lambda q, k, v, rope: full_attention(q, k, v, rope, causal=False)
    config = ModelConfig(**vars(model.config) | {"attention_mode": "bidirectional"})
    tokens = torch.randint(0, config.vocab_size, (2, 32))
    # of the attention backends, torch's counter sees into this one only
    with FlopCounterMode(display=False, custom_mapping=GROUPED_FLOPS) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens).sum().backward()
    predicted = cost.training_flops_per_token(config, 32) * tokens.numel()
    assert counter.get_total_flops() == pytest.approx(predicted, rel=0.01)


def test_of_causal_attention_half_is_counted(model: Rack) -> None:
    causal, full = (replace(model.config, attention_mode=mode) for mode in ("causal", "bidirectional"))
    assert cost.block_flops(causal, 0, 64) == cost.block_flops(full, 0, 32)


def test_loss_and_gradients_equal_those_of_full_logits(model: Rack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raygrow.nn.loss.LOGIT_BYTES", 97 * 8 * 5)  # chunks of 5 tokens, the last one shorter
    tokens, targets = torch.randint(0, 97, (2, 2, 16))
    targets[0, :3] = -100
    model = model.double()
    reference = copy.deepcopy(model)
    loss = model(tokens, targets).nats
    expected = torch.nn.functional.cross_entropy(reference(tokens).flatten(0, 1), targets.flatten(), reduction="sum")
    (loss * 3).backward()
    (expected * 3).backward()
    torch.testing.assert_close(loss, expected)
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_later_tokens_are_hidden_only_when_causal(model: Rack) -> None:
    tokens = torch.randint(0, 97, (1, 12))
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 97
    same = torch.allclose(model(tokens)[0, :-1], model(changed)[0, :-1], atol=1e-6)
    assert same == (model.config.attention_mode == "causal")


def test_regrouping_renames_nothing() -> None:
    config = ModelConfig(**BASE)
    one, four = Rack(config.regrouped(1)), Rack(config.regrouped(4))
    assert list(one.state_dict()) == list(four.state_dict())
    assert [len(stack.blocks) for stack in four.stacks] == [1, 1, 1, 1]


def test_initial_weights_depend_on_name_and_seed_alone() -> None:
    config = ModelConfig(**BASE)
    small, large = (Rack(c) for c in (config, ModelConfig(**BASE | {"vocab_size": 101})))
    for rack in (small, large):
        init_weights(rack, rack.config, seed=3)
    assert torch.equal(small.blocks[1].attention.q.weight, large.blocks[1].attention.q.weight)
    assert not torch.equal(small.blocks[1].attention.q.weight, small.blocks[0].attention.q.weight)
    assert small.blocks[0].attention.o.weight.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_heads": 5}, "d_model=48 is not a multiple of n_heads=5"),
        ({"n_kv_heads": 3}, "n_heads=4 is not a multiple of n_kv_heads=3"),
        ({"d_ff": 0}, "d_ff=0"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"n_experts": 2, "top_k": 1, "d_expert": -4}, "d_expert=-4"),
        ({"logit_scale": 0.0}, r"logit_scale=0\.0"),
        ({"rope_theta": 0}, "rope_theta=0: must be a number above 0"),
        ({"max_seq_len": 0}, "max_seq_len=0"),
        ({"norm_eps": -1e-5}, "norm_eps=-1e-05: must be a number of at least 0"),
        ({"init_std": float("nan")}, "init_std=nan"),
        ({"rotation": "block", "norm": "layernorm"}, "only rmsnorm is the same in every basis"),
    ],
)
def test_impossible_shapes_are_named(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**BASE | change)
