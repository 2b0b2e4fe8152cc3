"""Depth growth: which Block comes from where, what silent Blocks are, what is refused."""

import pytest
import torch

from raygrow.growth.depth import Depth
from raygrow.growth.gstack import Gstack
from raygrow.growth.model import grow_model
from raygrow.weights.moments import moment_rules
from tests.growth.racks import TOKENS, gradients, random_rack, tiny

FOUR = tiny(blocks_per_stack=4)


@pytest.mark.parametrize(
    ("operator", "origins"),
    [
        (Depth(extra_layers=2), [0, 1, 2, 3, 3, 3]),
        (Depth(extra_layers=2, source="back"), [0, 1, 2, 3, 2, 3]),
        (Depth(extra_layers=2, source="middle"), [0, 1, 2, 1, 2, 3]),
        (Depth(extra_layers=1, source="middle"), [0, 1, 1, 2, 3]),
        (Depth(extra_layers=4, source="middle"), [0, 1, 2, 3, 0, 1, 2, 3]),
        (Depth(extra_layers=1, source="spread"), [0, 0, 1, 2, 3]),
        (Depth(extra_layers=2, source="spread"), [0, 0, 1, 2, 2, 3]),
        (Depth(extra_layers=8, source="spread"), [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]),
        (Depth(blocks=(3, 0, 0, 1)), [3, 0, 0, 1]),
    ],
)
def test_blocks_come_from_where_the_source_says(operator, origins):
    source = random_rack(FOUR)
    assert list(operator.grow(FOUR).origins) == origins
    grown = grow_model(source, operator)
    for block, origin in zip(grown.blocks, origins, strict=True):
        theirs = source.blocks[origin].state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in block.state_dict().items())


def test_a_silent_block_is_a_copy_with_its_output_projections_at_zero():
    config = tiny(n_experts=2, top_k=1, dense_blocks=(0,), attention_bias=True, mlp_bias=True)
    source = random_rack(config)
    grown = grow_model(source, Depth(blocks=(0, 0, 1, 1, 2), identity=True))
    for block in (1, 3):
        theirs = source.blocks[block // 2].state_dict()
        for name, tensor in grown.blocks[block].state_dict().items():
            if name.split(".")[-2] in ("o", "down"):
                assert not tensor.any(), name
            else:
                assert torch.equal(tensor, theirs[name])


@pytest.mark.parametrize(
    ("operator", "exact"),
    [
        (Depth(blocks=(0, 1, 2, 3), identity=True), True),
        (Depth(blocks=(0, 1, 2, 3)), True),
        (Depth(blocks=(0, 1, 0, 2, 3, 1), identity=True), True),
        (Depth(blocks=(0, 1, 0, 2, 3, 1)), False),
        (Depth(blocks=(0, 1, 2, 2), identity=True), False),
        (Depth(blocks=(1, 0, 2, 3), identity=True), False),
    ],
)
@torch.no_grad()
def test_exact_is_promised_where_every_block_speaks_once_and_in_order(operator, exact):
    source = random_rack(FOUR)
    assert operator.grow(FOUR).exact == exact
    assert torch.equal(grow_model(source, operator)(TOKENS), source(TOKENS)) == exact


def test_gradients_after_exact_growth_are_those_that_the_table_gives():
    source, operator = random_rack(FOUR), Depth(extra_layers=2, source="middle", identity=True)
    growth = operator.grow(FOUR)
    theirs, ours = gradients(source), gradients(grow_model(source, operator))
    rules = moment_rules(growth.rules, "exp_avg", "copy")
    for name, gradient in ours.items():
        if name in rules:
            torch.testing.assert_close(gradient, rules[name].apply(theirs), rtol=1e-10, atol=1e-12)
        elif name.split(".")[-2] not in ("o", "down"):
            assert not gradient.any(), name
    # Adam starts afresh in the silent Blocks: nothing about their gradients follows from the source's
    assert {name.split(".")[1] for name in ours.keys() - rules.keys()} == {"3", "4"}


@pytest.mark.parametrize(
    "settings", [{}, {"n_stacks": 2, "blocks_per_stack": 3}, {"n_stacks": 5, "blocks_per_stack": 1}]
)
@pytest.mark.parametrize(
    "operator",
    [
        *(Depth(extra_layers=1, source=source) for source in ("last", "middle", "back", "spread")),
        Depth(extra_layers=2, source="last", identity=True),
        Depth(extra_layers=4, source="spread"),
    ],
)
def test_growing_what_was_shrunk_gives_the_target(operator, settings):
    target = tiny(**{"blocks_per_stack": 6} | settings)
    grown = operator.grow(operator.shrink(target)).config
    assert grown.regrouped(target.n_stacks) == target


def test_dense_blocks_follow_the_blocks_they_come_from():
    source = tiny(n_experts=2, top_k=1, dense_blocks=(1,))
    for operator, dense in (
        (Gstack(factor=2), (1, 4)),
        (Depth(extra_layers=2, source="back"), (1, 3)),
        (Depth(blocks=(1, 1, 2, 0)), (0, 1)),
    ):
        target = operator.grow(source).config
        assert target.dense_blocks == dense
        assert operator.shrink(target) == source


@pytest.mark.parametrize("operator", [Gstack(factor=2), Depth(extra_layers=2, source="middle")])
def test_a_target_whose_copies_differ_in_kind_is_refused(operator):
    target = tiny(blocks_per_stack=4, n_experts=2, top_k=1, dense_blocks=(1,))
    with pytest.raises(ValueError, match=r"dense_blocks=\[1\]: blocks \[1, 3\] are grown from the same block"):
        operator.shrink(target)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"extra_layers=0, blocks=\[\]: depth growth needs one of the two"),
        ({"extra_layers": 1, "blocks": (0,)}, "needs one of the two"),
        ({"extra_layers": -1}, "extra_layers=-1"),
        ({"extra_layers": 1.5}, r"extra_layers=1\.5"),
        ({"blocks": (0, -1)}, r"blocks=\[0, -1\]"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Depth(**settings)


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (Depth(blocks=(0, 4)), r"blocks=\[0, 4\]: the model has no block 4, only 4"),
        (Depth(extra_layers=5, source="back"), "extra_layers=5: source=back copies a segment of that length"),
    ],
)
def test_a_source_that_lacks_the_blocks_is_refused(operator, message):
    with pytest.raises(ValueError, match=message):
        operator.grow(FOUR)


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (Depth(blocks=(0, 1, 1)), r"blocks=\[0, 1, 1\]: lists 3 blocks, but the target has 4"),
        (Depth(extra_layers=4), "extra_layers=4: leaves no block of the target's 4"),
        (Depth(extra_layers=3, source="middle"), "is only 1 deep"),
    ],
)
def test_a_target_that_cannot_have_been_grown_is_refused(operator, message):
    with pytest.raises(ValueError, match=message):
        operator.shrink(FOUR)
