"""Gstack: which block comes from where, on configs, tensors, Racks and transformers models."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from raygrow.growth.gstack import Gstack
from raygrow.growth.model import gstack
from raygrow.nn.config import ModelConfig
from raygrow.nn.cost import parameters
from raygrow.nn.init import init_weights
from raygrow.nn.rack import Rack
from raygrow.weights.apply import apply_rules
from raygrow.weights.shapes import meta_rack, parameter_shapes

CONFIG = ModelConfig(
    vocab_size=48, d_model=16, n_heads=4, n_kv_heads=2, d_ff=24, n_stacks=1, blocks_per_stack=3, attention_bias=True
)
TOKENS = torch.randint(0, 48, (2, 11), generator=torch.Generator().manual_seed(0))


def random_rack(config: ModelConfig = CONFIG) -> Rack:
    model = Rack(config)
    init_weights(model, config, seed=0)
    return model


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("factor", [2, 3])
def test_block_i_is_block_i_mod_l_and_the_rest_is_copied(factor, tied):
    config = replace(CONFIG, tie_embeddings=tied)
    source = random_rack(config)
    before = state(source)
    target = gstack(source, growth_factor=factor)
    assert target.config == replace(config, n_stacks=factor)
    assert sum(parameter.numel() for parameter in target.parameters()) == parameters(target.config)
    for i, block in enumerate(target.blocks):
        assert same_state(block.state_dict(), source.blocks[i % 3].state_dict())
    for name in ("embedding.weight", "norm.weight") + (() if tied else ("head.weight",)):
        assert torch.equal(target.state_dict()[name], before[name])
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    assert same_state(before, source.state_dict()), "the grown model shares storage with its source"


def test_factor_one_is_the_identity():
    source = random_rack()
    target = gstack(source, growth_factor=1)
    assert Gstack(factor=1).grow(CONFIG).exact
    assert target.config == CONFIG
    assert same_state(source.state_dict(), target.state_dict())


@torch.no_grad()
def test_the_grown_rack_applies_the_source_blocks_again_and_again():
    source = random_rack().double()
    expected = copy.deepcopy(source)
    expected.stacks = source.stacks * 2
    expected.config = replace(CONFIG, n_stacks=2)
    assert torch.equal(gstack(source, growth_factor=2)(TOKENS), expected(TOKENS))


def test_the_same_rules_on_meta_tensors_predict_every_shape():
    growth = Gstack(factor=2).grow(CONFIG)
    shapes = {name: t.shape for name, t in apply_rules(growth.rules, dict(meta_rack(CONFIG).named_parameters()))}
    assert shapes == parameter_shapes(growth.config)


@pytest.mark.parametrize(
    ("n_stacks", "blocks_per_stack", "factor"), [(4, 3, 4), (4, 3, 2), (6, 1, 2), (1, 12, 3), (3, 4, 2), (5, 2, 1)]
)
def test_growing_what_was_shrunk_gives_the_target(n_stacks, blocks_per_stack, factor):
    target = replace(CONFIG, n_stacks=n_stacks, blocks_per_stack=blocks_per_stack)
    operator = Gstack(factor=factor)
    grown = operator.grow(operator.shrink(target)).config
    assert grown.regrouped(n_stacks) == target
    assert grown == target or n_stacks % factor


def test_a_target_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="factor=4 does not divide the target's 6 blocks"):
        Gstack(factor=4).shrink(replace(CONFIG, n_stacks=2))


@pytest.mark.parametrize("factor", [0, -2, 1.5, 2.0, "2", True, None])
def test_a_factor_that_is_no_positive_integer_is_refused(factor):
    with pytest.raises(ValueError, match=rf"factor={factor!r}"):
        Gstack(factor=factor)


@pytest.mark.parametrize("settings", [{}, {"num_key_value_heads": 2}, {"tie_word_embeddings": True}])
@torch.no_grad()
def test_a_transformers_llama_grows_into_a_transformers_llama(settings):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, **settings
    )
    source = LlamaForCausalLM(config).bfloat16().eval()
    source.generation_config.temperature = 0.3
    before = state(source)
    target = gstack(source, growth_factor=3)
    assert isinstance(target, LlamaForCausalLM)
    assert target.generation_config == source.generation_config
    assert target.generation_config is not source.generation_config
    assert (source.config.num_hidden_layers, target.config.num_hidden_layers) == (2, 6)
    assert (target.dtype, target.training) == (torch.bfloat16, False)
    for i, layer in enumerate(target.model.layers):
        assert layer.self_attn.layer_idx == i
        assert same_state(layer.state_dict(), source.model.layers[i % 2].state_dict())
    assert torch.equal(target.lm_head.weight, source.lm_head.weight)
    assert (target.lm_head.weight is target.model.embed_tokens.weight) == bool(settings.get("tie_word_embeddings"))
    assert target(TOKENS).logits.isfinite().all()
    assert target.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (2, 14)
    for parameter in target.parameters():
        parameter.zero_()
    assert same_state(before, source.state_dict())


@torch.no_grad()
def test_a_llama_that_grows_is_never_filled_with_random_weights(monkeypatch):
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, rope_theta=50.0
    )
    source = LlamaForCausalLM(config).eval()
    before = torch.get_rng_state()
    target = gstack(source, growth_factor=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(target(TOKENS).logits, source(TOKENS).logits)
