"""Derived mappings: one slice is made alone, through any chain, and is the slice of the whole."""

from dataclasses import dataclass

import pytest
import torch

from raygrow.weights.apply import Derived
from raygrow.weights.rules import Rule, Sliceable, Stacked, Term, copy_rule


@dataclass(frozen=True)
class _PlusOne:
    def apply(self, value, sources):
        return value + 1


class Whole(Sliceable):
    """Sources that tell what of them was asked for."""

    def __init__(self, tensors):
        self.tensors, self.asked = tensors, []

    def __getitem__(self, name):
        self.asked.append(name)
        return self.tensors[name]

    def take(self, name, index):
        self.asked.append((name, index))
        return self.tensors[name][index]

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


SOURCE = torch.arange(24.0).reshape(4, 3, 2)
RULES = {
    "copy": copy_rule("w"),
    "scaled": Rule((Term("w", 0.5),)),
    "tiled": Rule((Term("w", gather=(None, (0, 1, 2, 0), (1, 0))),)),
    "turned": Rule((Term("w", gather=((3, 2, 0, 1),)),)),
    "inner": Rule((Term("w", gather=(2, (1, 1, 0, 2))),)),
    "sum": Rule((Term("w"), Term("w", -2.0, gather=((1, 1, 1, 1), None, (0, 0))))),
}


@pytest.mark.parametrize("name", RULES)
def test_a_slice_is_that_of_the_whole_and_reads_nothing_else(name):
    sources = Whole({"w": SOURCE})
    renamed = Derived({"v": Rule((Term(name),))}, Derived(RULES, sources))
    for index in range(4):
        assert torch.equal(renamed.take("v", index), Derived(RULES, {"w": SOURCE})[name][index])
    assert "w" not in sources.asked


def test_one_of_a_stack_is_made_alone_and_a_filled_tensor_as_a_whole():
    sources = Whole({"w": SOURCE, "v": SOURCE + 100})
    rules = {
        "stacked": Stacked((Rule((Term("w", gather=(0,)),)), Rule((Term("v", gather=(3,)),), _PlusOne()))),
        "filled": Rule((Term("w"),), _PlusOne()),
    }
    derived = Derived(rules, sources)
    assert torch.equal(derived.take("stacked", 1), SOURCE[3] + 101)
    assert sources.asked == [("v", 3)]
    assert torch.equal(derived["stacked"], torch.stack((SOURCE[0], SOURCE[3] + 101)))
    assert torch.equal(derived.take("filled", 2), SOURCE[2] + 1)
