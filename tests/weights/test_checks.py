"""What the checks of tensors let pass, what they catch, and that shards add up to the whole."""

import math

import pytest
import torch

from raygrow.growth.depth import Depth
from raygrow.growth.experts import Experts
from raygrow.nn.config import ModelConfig
from raygrow.nn.cost import parameters
from raygrow.nn.init import init_weights
from raygrow.nn.rack import Rack
from raygrow.weights.checks import inherited_zeros, meant_zeros, statistics_checks, tensor_statistics

CONFIG = ModelConfig(vocab_size=48, d_model=16, n_heads=2, d_ff=24, blocks_per_stack=2)


@pytest.fixture
def rack() -> Rack:
    model = Rack(CONFIG)
    init_weights(model, CONFIG, seed=0)
    return model


def failed(checks):
    return {check.name: check.detail for check in checks if not check.passed}


def test_healthy_parameters_pass(rack):
    assert not failed(statistics_checks(*tensor_statistics(rack.named_parameters()), CONFIG))


@torch.no_grad()
def test_damaged_parameters_are_named(rack):
    rack.blocks[0].attention.q.weight[0, 0] = math.nan
    rack.blocks[0].mlp.down.weight[0, 0] = 1e6
    rack.blocks[1].mlp.up.weight.zero_()
    rack.norm.weight.zero_()
    rack.embedding.weight *= 1000
    found = failed(statistics_checks(*tensor_statistics(rack.named_parameters()), CONFIG))
    assert "blocks.0.attention.q.weight (1 not finite" in found["values"]
    assert "blocks.0.mlp.down.weight (0 not finite, 1 beyond" in found["values"]
    assert found["zeros"] == "blocks.1.mlp.up.weight, norm.weight"
    assert "embedding.weight (std 2" in found["standard deviations"]


@torch.no_grad()
def test_tensors_that_are_meant_to_be_zero_must_be(rack):
    zeros = {"blocks.1.attention.o.weight", "blocks.1.mlp.down.weight"}
    rack.blocks[1].attention.o.weight.zero_()
    found = failed(statistics_checks(*tensor_statistics(rack.named_parameters()), CONFIG, zeros=zeros))
    assert found == {"zeros": "blocks.1.mlp.down.weight (not zero, as its rule says)"}
    rack.blocks[1].mlp.down.weight.zero_()
    assert not failed(statistics_checks(*tensor_statistics(rack.named_parameters()), CONFIG, zeros=zeros))


def test_what_rules_make_zero():
    experts = Experts(n_experts=4, top_k=2, router_std=0).grow(CONFIG)
    assert meant_zeros(experts.rules) == {f"blocks.{i}.mlp.router.weight" for i in range(2)}
    silent = Depth(extra_layers=1, identity=True).grow(experts.config)
    assert meant_zeros(silent.rules) == {"blocks.2.attention.o.weight", "blocks.2.mlp.experts.down.weight"}
    assert not meant_zeros(Experts(n_experts=4, top_k=2).grow(CONFIG).rules)


@torch.no_grad()
def test_zeros_of_the_source_are_not_growths_fault(rack):
    rack.blocks[1].attention.o.weight.zero_()
    rules = dict(Depth(blocks=(0, 1, 1)).grow(CONFIG).rules) | {
        "new": Experts().grow(CONFIG).rules["blocks.0.mlp.router.weight"]
    }
    silent = {"blocks.1.attention.o.weight", "blocks.2.attention.o.weight"}
    suspects = [*silent, "blocks.0.attention.o.weight", "new"]
    assert inherited_zeros(suspects, rules, dict(rack.named_parameters())) == silent


@torch.no_grad()
def test_what_started_silent_may_still_be_small(rack):
    for parameter in (rack.blocks[1].attention.o.weight, rack.blocks[1].mlp.down.weight, rack.blocks[1].mlp.up.weight):
        parameter *= 1e-6
    found = failed(statistics_checks(*tensor_statistics(rack.named_parameters()), CONFIG))
    assert found.keys() == {"standard deviations"}
    assert found["standard deviations"].startswith("blocks.1.mlp.up.weight (std ")
    assert "," not in found["standard deviations"].partition(")")[2]


def test_statistics_of_shards_add_up(rack):
    names, whole = tensor_statistics(rack.named_parameters())
    shards = [
        tensor_statistics((name, part.chunk(3)[i]) for name, part in rack.named_parameters())[1] for i in range(3)
    ]
    torch.testing.assert_close(sum(shards), whole)
    assert len(names) == len(whole)
    assert int(whole[:, 0].sum()) == parameters(CONFIG)
