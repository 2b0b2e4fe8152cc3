"""Operators that promise to keep the function keep it: on every kind of model, alone and one after another."""

from itertools import product

import pytest
import torch

from raygrow.growth.depth import Depth
from raygrow.growth.experts import Experts
from raygrow.growth.gstack import Gstack
from raygrow.growth.model import grow_model
from raygrow.growth.operator import GrowthConfig
from raygrow.growth.width import Width
from raygrow.nn.config import ModelConfig
from raygrow.weights.apply import apply_rules
from raygrow.weights.shapes import meta_rack, parameter_shapes
from raygrow.weights.verify import output_difference
from tests.growth.racks import TOKENS, random_rack, tiny

MODELS = [
    pytest.param(
        tiny(
            blocks_per_stack=2,
            n_kv_heads=kv_heads,
            mlp=mlp,
            tie_embeddings=tied,
            n_experts=experts,
            top_k=2 if experts else 0,
            dense_blocks=(0,) if experts and tied else (),
            norm="layernorm" if mlp == "gelu" else "rmsnorm",
            qk_norm=kv_heads == 2,
            attention_bias=tied,
            mlp_bias=mlp == "gelu" or tied,
        ),
        id="-".join(
            [
                {4: "mha", 2: "gqa"}[kv_heads],
                mlp,
                "tied" if tied else "untied",
                "moe" if experts else "dense",
            ]
        ),
    )
    for kv_heads, mlp, tied, experts in [
        *product((4, 2), ("swiglu", "gelu"), (False, True), (0, 3)),
        *product((4,), ("reglu", "relu", "relu2"), (False,), (0, 3)),
    ]
]


def exact_operators(config: ModelConfig) -> list[GrowthConfig]:
    """Operators that can grow such a model exactly; width with its noise on."""
    operators = [
        Width(factor=2, noise_snr_db=10),
        Width(factor=1, heads=3, d_ff=2, untie=config.tie_embeddings, noise_snr_db=10),
        Depth(extra_layers=2, source="spread", identity=True),
        Gstack(factor=1),
    ]
    if not config.n_experts:
        operators += [Experts(n_experts=3, top_k=2), Experts(n_experts=4, top_k=3, blocks=(1,))]
    return operators


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("config", MODELS)
@torch.no_grad()
def test_one_exact_growth_or_two_keep_the_function(config, dtype, tolerance):
    source = random_rack(config, dtype)
    expected = source(TOKENS)
    for first in exact_operators(config):
        once = grow_model(source, first)
        assert output_difference(expected, once(TOKENS)) <= tolerance, first
        for second in exact_operators(once.config):
            twice = grow_model(once, second)
            assert output_difference(expected, twice(TOKENS)) <= tolerance, (first, second)


@pytest.mark.parametrize("config", MODELS)
def test_every_table_gives_the_shapes_of_the_grown_model(config):
    inexact = [Gstack(factor=2), Depth(blocks=(1, 0, 1))]
    inexact += [] if config.n_experts else [Experts(n_experts=3, top_k=1, norm_topk_prob=False, drop=0.5)]
    sources = dict(meta_rack(config).named_parameters())
    for operator in exact_operators(config) + inexact:
        growth = operator.grow(config)
        assert growth.exact == (operator not in inexact)
        assert len(growth.origins) == growth.config.n_blocks
        shapes = {name: tensor.shape for name, tensor in apply_rules(growth.rules, sources)}
        assert shapes == parameter_shapes(growth.config), operator


@pytest.mark.parametrize("operator", [Width(factor=2), Experts(n_experts=3, drop=0.5), Depth(extra_layers=1)])
def test_growing_is_repeatable_and_leaves_the_source_alone(operator):
    source = random_rack(tiny(), torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    one, other = grow_model(source, operator), grow_model(source, operator)
    for name, tensor in one.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, other.state_dict()[name])
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in before.items())
