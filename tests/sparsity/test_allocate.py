"""Every split of a level drops the same number of weights, and the search takes what costs least."""

from itertools import pairwise

import pytest
import torch

from raygrow.sparsity import allocate
from raygrow.sparsity.inputs import adapter_share, block_weights, input_size, input_weights, places
from raygrow.sparsity.levels import Levels
from raygrow.sparsity.methods import Choice
from raygrow.sparsity.plan import make_level
from tests.growth.racks import tiny
from tests.sparsity.racks import KINDS, TEXT, config, rack


@pytest.mark.parametrize("kind", KINDS)
def test_weights_behind_inputs_are_those_of_the_blocks(kind):
    model = rack(kind)
    c = model.config
    share = c.top_k / c.n_experts if c.n_experts else 1.0
    counted = sum(
        p.numel() * (share if ".experts." in name else 1)
        for name, p in model.blocks.named_parameters()
        if name.endswith("weight") and "norm" not in name
    )
    assert block_weights(c) == counted


def test_adapters_count_against_what_is_skipped():
    c = tiny(rotation="block")
    share = 2 * 16**2 / block_weights(c)
    assert adapter_share(c) == share
    half = {place: Choice(input_size(c, *place) // 2) for place in places(c)}
    level = make_level(c, half)
    assert level.nominal == pytest.approx(0.5)
    assert level.skipped == pytest.approx(0.5 - share)


@pytest.mark.parametrize("kind", ["gqa", "some dense", "mixtral"])
@pytest.mark.parametrize("ratio", allocate.RATIOS)
def test_every_ratio_drops_the_same(kind, ratio):
    c = config(kind)
    split = allocate.ratio_split(c, 0.5, ratio)
    dropped = sum(share * input_weights(c, *place) for place, share in split.items())
    assert dropped == pytest.approx(0.5 * block_weights(c))
    assert all(0 <= share <= allocate.LARGEST_SHARE for share in split.values())


def test_more_than_there_is_cannot_be_dropped():
    with pytest.raises(ValueError, match=r"sparsity=0\.97: more than can be dropped"):
        allocate.uniform(config("mha"), 0.97)


def test_the_cheapest_split_equalises_what_the_next_weights_cost():
    c = tiny(blocks_per_stack=1)
    # costs of a x^2, so the best shares are inverse to a / weight
    strength = {(0, "attention"): 4.0, (0, "o"): 1.0, (0, "mlp"): 8.0, (0, "down"): 1.0}
    costs = {place: [a * x**2 for x in allocate.PROBES] for place, a in strength.items()}
    split = allocate.cheapest(c, 0.3, costs)
    dropped = sum(share * input_weights(c, *place) for place, share in split.items())
    assert dropped == pytest.approx(0.3 * block_weights(c))
    found = sum(strength[place] * share**2 for place, share in split.items())
    even = allocate.uniform(c, 0.3)
    assert found < 0.9 * sum(strength[place] * share**2 for place, share in even.items())
    assert split[0, "down"] > split[0, "mlp"]


def test_noise_in_costs_does_not_make_a_later_step_cheaper():
    curve = allocate._convex([0.0, *allocate.PROBES], [0.0, 0.3, 0.2, 0.9, 0.8])
    values = [allocate._at(curve, x / 100) for x in range(96)]
    steps = [b - a for a, b in pairwise(values)]
    assert all(later >= earlier - 1e-12 for earlier, later in pairwise(steps))


def test_the_search_is_at_least_as_good_as_the_best_ratio_and_that_as_a_uniform_split():
    model = rack("mha", torch.float32)
    levels = Levels(model, "topk", TEXT)
    costs = []
    for split in ("uniform", "ratio", "search"):
        level = levels.level(0.5, split)
        assert level.nominal == pytest.approx(0.5, abs=0.02)
        levels.use(level.choices)
        costs.append(levels._divergence.measure())
    assert costs[2] <= costs[1] <= costs[0]
    assert costs[2] > 0


def test_a_dense_model_is_no_distance_from_itself():
    levels = Levels(rack("some dense"), "topk", TEXT, batch_size=3)
    assert abs(levels.cost({})) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_divergence_is_that_of_predictions_in_full_precision(dtype):
    model = rack("tied scaled", dtype)
    head_VD, found = model.head_weight.double(), []
    model.norm.register_forward_hook(lambda module, inputs, x_BTD: found.append(x_BTD.double()))
    levels = Levels(model, "topk", TEXT)
    split = allocate.uniform(model.config, 0.05)
    cost = levels.cost(split)
    levels.use({})
    model(TEXT)
    dense_BTD = found[-1]
    levels.use(levels.choices(split))
    model(TEXT)
    dense, sparse = ((x_BTD * 0.5 @ head_VD.T).log_softmax(-1) for x_BTD in (dense_BTD, found[-1]))
    expected = (dense.exp() * (dense - sparse)).sum().item() / TEXT.numel()
    assert cost == pytest.approx(expected, rel=1e-9 if dtype == torch.float64 else 1e-3)


def test_a_cost_is_that_of_all_tokens_whatever_was_measured_before():
    levels = Levels(rack("mha"), "topk", TEXT)
    split = allocate.uniform(levels.config, 0.5)
    cost = levels.cost(split)
    levels.measure({}, (TEXT, TEXT.roll(-1, 1)), "decode")
    assert levels.cost(split) == cost


def test_the_search_is_taken_where_it_costs_less_and_only_there(monkeypatch):
    levels = Levels(rack("mha"), "topk", TEXT)

    def one_block_matters(split):
        return sum((100.0 if block == 1 else 1.0) * share**2 for (block, _), share in split.items())

    def blocks_have_to_be_alike(split):
        alike = all(split[block, name] == split[0, name] for block, name in split) if len(split) > 1 else True
        return one_block_matters(split) + (0.0 if alike else 1e6)

    def dropped(level):
        return [1 - level.choices[block, "attention"].keep / 16 for block in range(3)]

    monkeypatch.setattr(levels, "cost", one_block_matters)
    first, sensitive, last = dropped(levels.level(0.5, "search"))
    assert sensitive < 0.1 < 0.5 < min(first, last)
    monkeypatch.setattr(levels, "cost", blocks_have_to_be_alike)
    first, sensitive, last = dropped(levels.level(0.5, "search"))
    assert first == sensitive == last > 0
