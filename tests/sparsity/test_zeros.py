"""Leaving out hidden units at zero changes nothing, and a plan says how many there are."""

import pytest
import torch

from raygrow.nn.joined import join
from raygrow.nn.rack import Rack
from raygrow.sparsity.apply import install
from raygrow.sparsity.config import SparsifyConfig, check_model
from raygrow.sparsity.inputs import block_weights
from raygrow.sparsity.levels import Levels
from raygrow.sparsity.linear import SparseRows
from raygrow.sparsity.zeros import ZeroSkippingMlp, skip_zeros
from tests.growth.racks import random_rack, tiny
from tests.sparsity.racks import TEXT

KINDS = {
    "reglu": {"mlp": "reglu"},
    "biases": {"mlp": "reglu", "mlp_bias": True},
    "relu": {"mlp": "relu", "mlp_bias": True},
    "relu2": {"mlp": "relu2"},
    "some dense": {"mlp": "relu2", "n_experts": 3, "top_k": 2, "dense_blocks": (0, 2)},
}


def shut(model: Rack) -> Rack:
    """The same model with most of its hidden units at zero: a unit that a gate of its own kind is far below."""
    with torch.no_grad():
        for block in model.blocks:
            if (mlp := getattr(block.mlp, "experts", block.mlp)).up.bias is not None:
                (mlp.gate if hasattr(mlp, "gate") else mlp.up).bias -= 2.5
    return model


@pytest.mark.parametrize("tokens", [1, 3, 32])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_model_that_skips_zeros_is_the_model(kind: str, tokens: int) -> None:
    model = shut(random_rack(tiny(**KINDS[kind])))
    text_BT = TEXT[:1, :tokens]
    expected = model(text_BT)
    skip_zeros(model)
    skipping = [isinstance(block.mlp, ZeroSkippingMlp) for block in model.blocks]
    assert skipping == [not model.config.has_experts(i) for i in range(3)]
    torch.testing.assert_close(model(text_BT), expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_other_kinds_are_left_as_they_are() -> None:
    model = random_rack(tiny())
    before = [block.mlp for block in model.blocks]
    skip_zeros(model)
    assert all(block.mlp is mlp for block, mlp in zip(model.blocks, before, strict=True))


def test_a_joined_model_is_refused() -> None:
    with pytest.raises(ValueError, match="sparse or joined already: load it again"):
        skip_zeros(join(random_rack(tiny(mlp="reglu"))))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_level_is_the_share_of_weights_behind_units_at_zero(kind: str) -> None:
    model = shut(random_rack(tiny(**KINDS[kind])))
    config, at_zero = model.config, [0.0] * 3
    for index, block in enumerate(model.blocks):
        down = getattr(block.mlp, "experts", block.mlp).down
        down.register_forward_pre_hook(
            lambda module, inputs, index=index: at_zero.__setitem__(index, (inputs[0] == 0).double().mean().item())
        )
    expected = model(TEXT)
    level = Levels(model, "relu", TEXT).zeros()
    hidden = [0 if config.has_experts(i) else config.d_ff for i in range(3)]  # experts are read whole
    behind = 2 if config.gated else 1  # rows of `up` and `down`, or of `down` alone
    skipped = sum(share * size * config.d_model * behind for share, size in zip(at_zero, hidden, strict=True))
    assert level.nominal == level.skipped == pytest.approx(skipped / block_weights(config), abs=0.02)
    again = random_rack(config)
    shut(again)
    for place, selector in install(again, "relu", SparseRows()).items():
        selector.choice = level.choices[place]
    torch.testing.assert_close(again(TEXT), expected, rtol=1e-10, atol=1e-10)


def test_a_model_of_experts_alone_has_nothing_to_leave_out() -> None:
    experts = {"mlp": "reglu", "n_experts": 4, "top_k": 2}
    with pytest.raises(ValueError, match="here: method=relu: every Block of this model has experts"):
        check_model(tiny(**experts), SparsifyConfig(method="relu"), "here")
    check_model(tiny(**experts, dense_blocks=(1,)), SparsifyConfig(method="relu"), "here")
