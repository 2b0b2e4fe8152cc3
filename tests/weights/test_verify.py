"""The verifier: what it lets pass, what it catches, and that shards add up to the whole."""

import json
import math

import pytest
import torch

from raygrow.nn.config import ModelConfig
from raygrow.nn.cost import parameters
from raygrow.nn.init import init_weights
from raygrow.nn.rack import Rack
from raygrow.weights.verify import Check, Outputs, statistics_checks, tensor_statistics, verify

CONFIG = ModelConfig(vocab_size=48, d_model=16, n_heads=2, d_ff=24, blocks_per_stack=2)
LOGITS = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))


def judge(before=LOGITS, after=LOGITS, *, losses=(2.0, 2.0), **changes):
    settings = {
        "operator": {"operator": "gstack", "factor": 2},
        "exact": False,
        "source": CONFIG,
        "target": CONFIG,
        "parameters": parameters(CONFIG),
    }
    outputs = [Outputs(logits_BTV=logits, loss=loss) for logits, loss in zip((before, after), losses, strict=True)]
    return verify(*outputs, **(settings | changes))


@pytest.fixture
def rack() -> Rack:
    model = Rack(CONFIG)
    init_weights(model, CONFIG, seed=0)
    return model


def failed(checks):
    return {check.name: check.detail for check in checks if not check.passed}


def test_a_sound_growth_passes_and_is_recorded_as_json():
    record = judge(losses=(2.0, 2.5), max_loss_jump=1.0)
    assert record.failure is None
    tree = json.loads(json.dumps(record.to_json(), allow_nan=False))
    assert tree["passed"]
    assert tree["loss_jump"] == 0.5
    assert [check["name"] for check in tree["checks"]] == ["parameter count", "loss"]


@pytest.mark.parametrize(
    ("dtype", "small", "large"),
    [(torch.float64, 1e-12, 1e-9), (torch.float32, 1e-6, 1e-4), (torch.bfloat16, 1e-2, 2e-1)],
)
def test_an_exact_growth_is_held_to_the_rounding_of_its_dtype(dtype, small, large):
    before = LOGITS.double() / LOGITS.abs().max()
    assert judge(before, (before + small).to(dtype), exact=True).passed
    record = judge(before, (before + large).to(dtype), exact=True)
    assert "same function" in record.failure
    assert judge(before, (before + large).to(dtype), exact=False).passed


def test_failures_carry_their_figures():
    assert "rise of 1.5000 nats where max_loss_jump=1 " in judge(losses=(2.0, 3.5), max_loss_jump=1.0).failure
    assert "7 parameters, " in judge(parameters=7).failure
    assert "seam: torn" in judge(checks=[Check(name="seam", passed=False, detail="torn")]).failure
    broken = judge(losses=(2.0, math.nan))
    assert "gstack factor=2 failed its verification" in broken.failure
    assert broken.to_json()["loss_after"] is None


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


def test_statistics_of_shards_add_up(rack):
    names, whole = tensor_statistics(rack.named_parameters())
    shards = [
        tensor_statistics((name, part.chunk(3)[i]) for name, part in rack.named_parameters())[1] for i in range(3)
    ]
    torch.testing.assert_close(sum(shards), whole)
    assert len(names) == len(whole)
    assert int(whole[:, 0].sum()) == parameters(CONFIG)
