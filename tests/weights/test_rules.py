"""Rules: the arithmetic, and the same table on full, lazy and meta tensors."""

import pytest
import torch

from raygrow.weights.apply import Derived, apply_rules
from raygrow.weights.rules import Rule, Stacked, Term, copy_rule


def test_a_copy_returns_the_source_itself():
    weight = torch.randn(3, 2)
    assert copy_rule("w").apply({"w": weight}) is weight


def test_terms_add_up_and_gather_along_axes():
    w, b = torch.randn(2, 3), torch.randn(4, 3)
    rule = Rule((Term("w", 0.5, gather=((0, 1, 0, 1), None)), Term("b", gather=(None, (2, 1, 0)))))
    assert rule.sources == ("w", "b")
    torch.testing.assert_close(rule.apply({"w": w, "b": b}), torch.cat((w, w)) / 2 + b.flip(1))


def test_a_missing_source_is_named():
    with pytest.raises(ValueError, match=r"'blocks\.1\.mlp\.up\.weight' is missing"):
        copy_rule("blocks.1.mlp.up.weight").apply({})


def test_meta_tensors_give_shapes():
    sources = {"w": torch.empty(2, 3, device="meta", dtype=torch.bfloat16)}
    (pair,) = apply_rules({"tall": Rule((Term("w", 2.0, gather=((0, 0, 1), None)),))}, sources)
    assert (pair[0], pair[1].shape, pair[1].dtype, pair[1].is_meta) == ("tall", (3, 3), torch.bfloat16, True)


def test_derived_views_chain_and_compute_only_what_is_asked_for():
    sources = {"a": torch.ones(2)}
    renamed = Derived({"b": copy_rule("a"), "broken": copy_rule("nowhere")}, sources)
    doubled = Derived({"c": Rule((Term("b", 2.0),)), "never": copy_rule("broken")}, renamed)
    assert list(doubled) == ["c", "never"]
    assert "never" in doubled
    assert len(doubled) == 2
    assert doubled["c"].tolist() == [2.0, 2.0]


def test_stacked_rules_make_the_slices_of_one_tensor():
    w, b = torch.randn(3, 2), torch.randn(3, 2)
    rule = Stacked((Rule((Term("w", 2.0),)), copy_rule("b"), copy_rule("w")))
    assert rule.sources == ("w", "b", "w")
    assert torch.equal(rule.apply({"w": w, "b": b}), torch.stack((2 * w, b, w)))


def test_an_integer_takes_one_slice_and_drops_the_axis():
    w = torch.randn(3, 4, 5)
    taken = Rule((Term("w", gather=(1, None, (4, 0, 0))),)).apply({"w": w})
    assert torch.equal(taken, w[1][:, [4, 0, 0]])
    assert torch.equal(Rule((Term("w", gather=(None, 2)),)).apply({"w": w}), w[:, 2])


def test_a_fill_is_given_the_sum_of_the_terms():
    class Negative:
        def apply(self, value, sources):
            return -value

    assert Rule((Term("w"), Term("w")), Negative()).apply({"w": torch.ones(2)}).tolist() == [-2.0, -2.0]
