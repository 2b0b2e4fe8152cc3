"""The verifier: what it lets pass and what it catches."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from raygrow.nn.config import ModelConfig
from raygrow.nn.cost import parameters
from raygrow.weights.checks import Check
from raygrow.weights.verify import Outputs, block_drifts, verify

CONFIG = ModelConfig(vocab_size=48, d_model=16, n_heads=2, d_ff=24, blocks_per_stack=2)
LOGITS = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
RESIDUALS = torch.randn(3, 2, 5, 16, generator=torch.Generator().manual_seed(1)).double().unbind()
ROUTER = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(2))


def outputs(logits: Tensor = LOGITS, residuals=RESIDUALS[:2], router=None, loss: float = 2.0) -> Outputs:
    return Outputs(logits_BTV=logits, residuals_BTD=residuals, router_logits_BTE=router or {}, loss=loss)


def judge(before=LOGITS, after=LOGITS, *, losses=(2.0, 2.0), **changes):
    said = [outputs(logits, loss=loss) for logits, loss in zip((before, after), losses, strict=True)]
    return judge_outputs(*said, **changes)


def judge_outputs(before: Outputs, after: Outputs, **changes):
    settings = {
        "operator": {"operator": "gstack", "factor": 2},
        "exact": False,
        "origins": (0, 1),
        "source": CONFIG,
        "target": CONFIG,
        "parameters": parameters(CONFIG),
    }
    return verify(before, after, **(settings | changes))


def test_a_sound_growth_passes_and_is_recorded_as_json():
    record = judge(losses=(2.0, 2.5), max_loss_jump=1.0)
    assert record.failure is None
    tree = json.loads(json.dumps(record.to_json(), allow_nan=False))
    assert tree["passed"]
    assert tree["loss_jump"] == 0.5
    assert [check["name"] for check in tree["checks"]] == [
        "parameter count",
        "rope integrity",
        "functional identity",
        "loss jump",
    ]
    assert [(block["block"], block["source"], block["residual"]) for block in tree["blocks"]] == [(0, 0, 0), (1, 1, 0)]


@pytest.mark.parametrize(
    ("dtype", "small", "large"),
    [(torch.float64, 1e-12, 1e-9), (torch.float32, 1e-6, 1e-4), (torch.bfloat16, 1e-2, 2e-1)],
)
def test_an_exact_growth_is_held_to_the_rounding_of_its_dtype(dtype, small, large):
    before = LOGITS.double() / LOGITS.abs().max()
    assert judge(before, (before + small).to(dtype), exact=True).passed
    record = judge(before, (before + large).to(dtype), exact=True)
    assert "functional identity" in record.failure
    assert judge(before, (before + large).to(dtype), exact=False).passed


def test_the_block_after_which_the_function_changes_is_named():
    torn = outputs(residuals=[RESIDUALS[0], RESIDUALS[1] * 1.01])
    record = judge_outputs(outputs(), torn, exact=True)
    assert "differs by at most 0.01 of its size (after Block 1, Block 1 of the source)" in record.failure
    drifting = judge_outputs(outputs(), torn, exact=False)
    assert drifting.passed
    assert [drift.residual for drift in drifting.blocks] == pytest.approx([0, 0.01])
    nan = judge_outputs(outputs(), outputs(residuals=[RESIDUALS[0] * math.nan, RESIDUALS[1]]), exact=True)
    assert "after Block 0" in nan.failure


def test_every_copy_of_a_wider_stream_counts():
    wide = [torch.cat((r, r), -1) for r in RESIDUALS[:2]]
    assert all(drift.residual == 0 for drift in block_drifts(outputs(), outputs(residuals=wide), (0, 1), top_k=0))
    wide[1][..., 16:] *= 1.1
    drifts = block_drifts(outputs(), outputs(residuals=wide), (0, 1), top_k=0)
    assert [drift.residual for drift in drifts] == pytest.approx([0, 0.1])


@pytest.mark.parametrize(
    ("origins", "stream"),
    [((0, 0, 1, 1), (0, 0, 1, 1)), ((0, 1, 2, 1, 2), (0, 1, 2, 2, 2)), ((0, 1, 2, 2), (0, 1, 2, 2))],
)
def test_silent_copies_leave_the_stream_where_it_was(origins, stream):
    before, after = outputs(residuals=RESIDUALS), outputs(residuals=[RESIDUALS[i] for i in stream])
    drifts = block_drifts(before, after, origins, top_k=0)
    assert [drift.source for drift in drifts] == list(stream)
    assert all(drift.residual == 0 for drift in drifts)


def test_routers_are_compared_where_both_sides_have_one():
    before = outputs(router={1: ROUTER})
    assert "router logit scale" not in [
        check.name for check in judge_outputs(before, outputs(router={0: ROUTER})).checks
    ]
    same = judge_outputs(before, outputs(router={1: ROUTER}), exact=True, target=replace(CONFIG, n_experts=4, top_k=2))
    (check,) = (check for check in same.checks if check.name == "router logit scale")
    assert check.passed
    assert "1 to 1 times the source's, 0.00% of the tokens' places moved" in check.detail


def test_a_router_that_lost_its_scale_is_found():
    target = replace(CONFIG, n_experts=4, top_k=2)
    record = judge_outputs(
        outputs(router={1: ROUTER}), outputs(router={1: 2 * ROUTER}), exact=True, target=target, parameters=0
    )
    assert "differ by at most 1 of their size (Block 1), their scale is 2 to 2 times the source's" in record.failure
    swapped = outputs(router={1: ROUTER.flip(-1)})
    (drift,) = [d for d in block_drifts(outputs(router={1: ROUTER}), swapped, (0, 1), top_k=2) if d.router is not None]
    chosen = [set(row.topk(2).indices.tolist()) for row in ROUTER.flatten(0, 1)]
    moved = [len({3 - expert for expert in row} - row) for row in chosen]
    assert drift.rerouted == pytest.approx(sum(moved) / 20)
    assert drift.router_scale == pytest.approx(1)


def test_rotary_positions_must_keep_their_meaning():
    record = judge(target=replace(CONFIG, head_dim=4, n_heads=4), parameters=0)
    assert "rope integrity: head_dim 8 -> 4" in record.failure


def test_failures_carry_their_figures():
    assert "rise of 1.5000 nats where max_loss_jump=1 " in judge(losses=(2.0, 3.5), max_loss_jump=1.0).failure
    assert "7 parameters, " in judge(parameters=7).failure
    assert "seam: torn" in judge(checks=[Check(name="seam", passed=False, detail="torn")]).failure
    broken = judge(losses=(2.0, math.nan))
    assert "gstack factor=2 failed its verification" in broken.failure
    assert broken.to_json()["loss_after"] is None
