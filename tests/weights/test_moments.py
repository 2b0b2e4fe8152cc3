"""Tables for Adam's moments: scaled as gradients scale, left out where nothing is known, only first copies if asked.

That the coefficients in the operators' tables are right is tested by gradients, in tests/growth.
"""

import torch

from raygrow.growth.depth import Depth
from raygrow.growth.experts import Experts
from raygrow.growth.gstack import Gstack
from raygrow.growth.width import Width
from raygrow.weights.apply import apply_rules
from raygrow.weights.fills import Fresh
from raygrow.weights.moments import moment_rules
from raygrow.weights.rules import Rule, Term, copy_rule
from tests.growth.racks import random_rack, tiny


def moments(operator, config, moment, policy="copy"):
    """The source's and the grown model's, one of Adam's moments of each."""
    theirs = {name: p.detach().abs() for name, p in random_rack(config).named_parameters()}
    return theirs, dict(apply_rules(moment_rules(operator.grow(config).rules, moment, policy), theirs))


def test_coefficients_become_those_of_gradients_and_fills_go():
    rules = {
        "grown": Rule((Term("w", 0.5, ((0, 0),), 0.25),), Fresh((2,), 1.0, "w", "w", 0)),
        "copied": copy_rule("w"),
        "fresh": Rule(fill=Fresh((2,), 1.0, "w", "w", 0)),
        "silent": Rule((Term("w", 0.0, gradient=0.0),)),
    }
    m, v = (moment_rules(rules, moment, "copy") for moment in ("exp_avg", "exp_avg_sq"))
    assert list(m) == list(v) == ["grown", "copied"]
    source = {"w": torch.tensor([16.0])}
    assert m["grown"].apply(source).tolist() == [4.0, 4.0]
    assert v["grown"].apply(source).tolist() == [1.0, 1.0]
    assert m["copied"] == v["copied"] == copy_rule("w")


def test_stacked_blocks_go_on_with_the_moments_of_what_they_copy():
    theirs, ours = moments(Gstack(factor=2), tiny(), "exp_avg_sq")
    assert torch.equal(ours["blocks.4.mlp.up.weight"], theirs["blocks.1.mlp.up.weight"])
    assert ours.keys() == Gstack(factor=2).grow(tiny()).rules.keys()


def test_asymmetric_leaves_out_later_copies_of_whole_blocks():
    for operator, first in ((Gstack(factor=2), {0, 1, 2}), (Depth(blocks=(2, 2, 0, 1, 0)), {0, 2, 3})):
        for moment in ("exp_avg", "exp_avg_sq"):
            theirs, ours = moments(operator, tiny(tie_embeddings=True), moment, "asymmetric")
            assert {int(name.split(".")[1]) for name in ours if name.startswith("blocks.")} == first
            assert torch.equal(ours["embedding.weight"], theirs["embedding.weight"])


def test_asymmetric_keeps_m_of_the_first_copy_in_every_axis_and_v_everywhere():
    config = tiny(n_kv_heads=2, attention_bias=True)
    operator = Width(factor=3, heads=2)
    theirs, m = moments(operator, config, "exp_avg", "asymmetric")
    _, m_copied = moments(operator, config, "exp_avg", "copy")
    _, v = moments(operator, config, "exp_avg_sq", "asymmetric")
    _, v_copied = moments(operator, config, "exp_avg_sq", "copy")
    assert m.keys() == v.keys() == m_copied.keys()
    for name, moment in m.items():
        first = tuple(slice(size) for size in theirs[name].shape)
        assert torch.equal(moment[first], m_copied[name][first])
        assert moment.count_nonzero() == theirs[name].numel()
        assert torch.equal(v[name], v_copied[name])


def test_asymmetric_keeps_m_of_the_first_expert_only():
    theirs, m = moments(Experts(n_experts=4), tiny(), "exp_avg", "asymmetric")
    _, v = moments(Experts(n_experts=4), tiny(), "exp_avg_sq", "asymmetric")
    up = theirs["blocks.0.mlp.up.weight"]
    assert torch.equal(m["blocks.0.mlp.experts.up.weight"][0], up / 4)
    assert not m["blocks.0.mlp.experts.up.weight"][1:].any()
    assert torch.equal(v["blocks.0.mlp.experts.up.weight"], torch.stack([up / 16] * 4))
    assert "blocks.0.mlp.router.weight" not in m


def test_asymmetric_takes_experts_that_grow_wider_for_different_ones():
    config = tiny(n_experts=3, top_k=1)
    theirs, m = moments(Width(factor=2), config, "exp_avg", "asymmetric")
    up = m["blocks.0.mlp.experts.up.weight"]
    assert torch.equal(up[:, :24, :16], theirs["blocks.0.mlp.experts.up.weight"] / 2)
    assert not up[:, 24:].any()
    assert not up[:, :, 16:].any()


def test_an_untied_head_is_no_copy_of_the_embedding():
    config = tiny(tie_embeddings=True)
    theirs, m = moments(Width(factor=2, untie=True), config, "exp_avg", "asymmetric")
    assert torch.equal(m["embedding.weight"][:, :16], theirs["embedding.weight"] / 2)
    assert torch.equal(m["head.weight"][:, :16], theirs["embedding.weight"])
