"""A sparse model computes what a dense one does whose inputs have lost entries."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from raygrow.kernels.group_select import list_groups
from raygrow.sparsity import linear
from raygrow.sparsity.allocate import uniform
from raygrow.sparsity.apply import install
from raygrow.sparsity.inputs import Place, block_weights, input_size, input_weights
from raygrow.sparsity.levels import TOLERANCE, Levels
from raygrow.sparsity.linear import SparseRows
from raygrow.sparsity.methods import METHODS, THRESHOLDED, WEIGHTED, Choice, Method
from raygrow.sparsity.policy import policy_loss
from tests.growing_cache import growing_attends
from tests.growth.racks import random_rack, tiny
from tests.sparsity.plans import spread
from tests.sparsity.racks import KINDS, TEXT, rack

TARGETS = TEXT.roll(-1, 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_model_that_keeps_all_is_the_dense_model(kind, method):
    model = rack(kind)
    expected = model(TEXT)
    install(model, method, SparseRows())
    torch.testing.assert_close(model(TEXT), expected, rtol=1e-10, atol=1e-10)


def zero_all_but(keep: int, norms: Tensor | None = None):
    def hook(module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *rest = inputs
        scores = x.abs() if norms is None else x.abs() * norms
        smallest = scores.sort(descending=True).values[..., keep - 1 : keep]
        return (torch.where(scores >= smallest, x, 0.0), *rest)

    return hook


def norms(*weights: Tensor) -> Tensor:
    return torch.cat([weight.flatten(0, -2) for weight in weights]).norm(dim=0)


@pytest.mark.parametrize("method", ["topk", "wina", "rotated_wina"])
@pytest.mark.parametrize("kind", ["gqa", "biases", "gelu"])
@torch.no_grad()
def test_a_sparse_model_is_a_dense_one_with_zeros_in_its_inputs(kind, method):
    model, reference = rack(kind), rack(kind)
    selectors = install(model, method, SparseRows())
    for place, selector in selectors.items():
        selector.choice = Choice(input_size(model.config, *place) // 2)
    for block in reference.blocks:
        attention, mlp, weighted = block.attention, block.mlp, method != "topk"
        readers = [mlp.gate, mlp.up] if hasattr(mlp, "gate") else [mlp.up]
        for module, projections in (
            (attention, [attention.q, attention.k, attention.v]),
            (attention.o, [attention.o]),
            (mlp, readers),
            (mlp.down, [mlp.down]),
        ):
            weights = [projection.weight for projection in projections]
            half = weights[0].shape[1] // 2
            module.register_forward_pre_hook(zero_all_but(half, norms(*weights) if weighted else None))
    torch.testing.assert_close(model(TEXT), reference(TEXT), rtol=1e-9, atol=1e-9)


def drop_by_expert(module, x_SF: Tensor, offsets_E: Tensor, *, weighted: bool) -> tuple[Tensor, Tensor]:
    """Nine entries of each slot, by the norms of its own expert's columns."""
    parts = x_SF.tensor_split(offsets_E[:-1].tolist())
    by_expert = [norms(weight_DF) if weighted else None for weight_DF in module.weight]
    return torch.cat([zero_all_but(9, n)(module, (x,))[0] for n, x in zip(by_expert, parts, strict=True)]), offsets_E


@pytest.mark.parametrize("method", ["topk", "wina", "rotated_wina"])
@torch.no_grad()
def test_experts_share_what_is_kept_and_the_router_reads_all(method):
    model, reference = rack("mixtral"), rack("mixtral")
    for place, selector in install(model, method, SparseRows()).items():
        selector.choice = Choice(input_size(model.config, *place) if place[1] in ("attention", "o") else 9)
    for block in reference.blocks:
        experts, weighted = block.mlp.experts, method != "topk"
        of_x = norms(experts.gate.weight, experts.up.weight)
        experts.register_forward_pre_hook(zero_all_but(9, of_x if weighted else None))
        experts.down.register_forward_pre_hook(
            lambda module, inputs, weighted=weighted: drop_by_expert(module, *inputs, weighted=weighted)
        )
    torch.testing.assert_close(model(TEXT), reference(TEXT), rtol=1e-9, atol=1e-9)


def dropped(levels: Levels, choices: Mapping[Place, Choice]) -> float:
    """The share of the Blocks' weights that a text's tokens do not multiply by."""
    levels.use(choices)
    for selector in levels.selectors.values():
        selector.seen = (0, 0)
    levels.model(TEXT)
    config, lost = levels.config, 0.0
    for place, selector in levels.selectors.items():
        lost += input_weights(config, *place) * (1 - selector.seen[0] / selector.seen[1])
    return lost / block_weights(config)


@pytest.mark.parametrize("method", THRESHOLDED)
@pytest.mark.parametrize("kind", ["gqa", "mixtral"])
@torch.no_grad()
def test_thresholds_drop_as_much_as_is_asked_for(kind, method):
    levels = Levels(rack(kind), method, TEXT)
    unfitted = dropped(levels, levels.choices(uniform(levels.config, 0.6)))
    level = levels.level(0.6, "uniform")
    assert abs(unfitted - 0.6) > TOLERANCE  # those of dense activations do not
    assert dropped(levels, level.choices) == pytest.approx(0.6, abs=TOLERANCE)
    assert level.nominal == level.skipped == pytest.approx(0.6, abs=0.02)  # of 16 entries


@pytest.mark.parametrize("method", THRESHOLDED)
@pytest.mark.parametrize("kind", ["gqa", "mixtral"])
@torch.no_grad()
def test_at_no_sparsity_thresholds_keep_all(kind, method):
    model = rack(kind)
    expected = model(TEXT)
    levels = Levels(model, method, TEXT)
    assert abs(levels.cost({})) < 1e-12
    assert levels.level(0.0, "search").nominal == 0
    torch.testing.assert_close(model(TEXT), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", THRESHOLDED)
@torch.no_grad()
def test_a_threshold_keeps_what_scores_above_it(method):
    levels = Levels(rack("gqa"), method, TEXT)
    model, weights = levels.model, rack("gqa").blocks[0].attention
    levels.use(levels.choices(uniform(model.config, 0.4)))
    selector = levels.selectors[0, "attention"]
    column_D = norms(weights.q.weight, weights.k.weight, weights.v.weight) if method in WEIGHTED else torch.ones(16)
    x_RD = torch.randn(9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    x_RD[0] = selector.choice.threshold / column_D * torch.linspace(0.7, 1.3, 16)
    x_RD[1] = -x_RD[0]
    kept_RD = x_RD.abs() * column_D > selector.choice.threshold
    assert 0 < kept_RD.sum() < kept_RD.numel()
    assert kept_RD[0].sum() == kept_RD[1].sum() == 8
    assert torch.equal(selector.masked(x_RD), torch.where(kept_RD, x_RD, 0))
    for each in levels.selectors.values():
        each.seen = (0, 0)
    model(TEXT)
    kept, total = selector.seen
    assert kept / total == pytest.approx(0.6, abs=0.02)  # the first Block reads what it read in calibration


@torch.no_grad()
def test_hidden_units_of_experts_score_by_their_own_experts_columns():
    model, reference = rack("mixtral"), rack("mixtral")
    levels = Levels(model, "rotated_teal", TEXT)
    levels.use(levels.choices({place: 0.5 for place in levels.selectors if place[1] == "down"}))
    shares = []
    for index, block in enumerate(reference.blocks):
        threshold = levels.selectors[index, "down"].choice.threshold

        def drop(module, inputs, threshold=threshold):
            x_SF, offsets_E = inputs
            column_EF = module.weight.norm(dim=1)
            column_SF = column_EF.repeat_interleave(offsets_E.diff(prepend=offsets_E.new_zeros(1)), 0)
            kept_SF = x_SF.abs() * column_SF > threshold
            shares.append(kept_SF.double().mean().item())
            return torch.where(kept_SF, x_SF, 0), offsets_E

        block.mlp.experts.down.register_forward_pre_hook(drop)
    torch.testing.assert_close(model(TEXT), reference(TEXT), rtol=1e-9, atol=1e-9)
    assert shares[0] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("kind", ["gqa", "some dense"])
@torch.no_grad()
def test_decode_only_is_what_decoding_token_by_token_computes(kind):
    model, prompt = rack(kind), TEXT.shape[1] // 2
    rows = SparseRows()
    for place, selector in install(model, "topk", rows).items():
        selector.choice = Choice(input_size(model.config, *place) // 2)
    attends = growing_attends(model.config.n_blocks)
    rows.stop = 0
    model(TEXT[:, :prompt], attends=attends)
    rows.stop = None
    total = 0.0
    for t in range(prompt, TEXT.shape[1]):
        logits = model(TEXT[:, t : t + 1], positions_T=torch.tensor([t]), attends=attends)
        total += torch.nn.functional.cross_entropy(logits[:, 0], TARGETS[:, t], reduction="sum").item()
    loss = policy_loss(model, rows, (TEXT, TARGETS), "decode", batch_size=3)
    assert loss == pytest.approx(total / (TEXT.shape[0] * (TEXT.shape[1] - prompt)), rel=1e-9)


@torch.no_grad()
def test_a_sparse_model_has_one_copy_of_its_weights():
    for kind in ("gqa", "mixtral", "biases"):
        model = rack(kind)
        expected = sum(parameter.numel() for parameter in model.parameters())
        install(model, "topk", SparseRows())
        assert sum(parameter.numel() for parameter in model.parameters()) == expected
        for stack in model.stacks:
            assert all(block in list(model.blocks) for block in stack.blocks)
        with pytest.raises(ValueError, match="sparse or joined already"):
            install(model, "topk", SparseRows())


@torch.no_grad()
def test_rows_do_not_depend_on_those_beside_them():
    model = rack("some dense")
    rows = SparseRows()
    for place, selector in install(model, "topk", rows).items():
        selector.choice = Choice(input_size(model.config, *place) // 3)
    x = torch.randn(1, 7, 16, dtype=torch.float64)
    for block in model.blocks:
        rows.stop = 3
        some = block.mlp(x, x)
        rows.stop = None
        every = block.mlp(x, x)
        rows.stop = 0
        none = block.mlp(x, x)
        torch.testing.assert_close(some, torch.cat([every[:, :3], none[:, 3:]], 1))
        assert not torch.allclose(every, none)


def half(method: Method, size: int) -> Choice:
    """Half of an input, as a method chooses it."""
    if method == "grouped":
        return Choice(size // 2, groups=spread(size // 2, size))
    return Choice(size // 2, 0.7 if method in THRESHOLDED else None)


@pytest.mark.parametrize("kind", [*KINDS, "reglu", "layernorm"])
@pytest.mark.parametrize("method", ["topk", "wina", "grouped", *THRESHOLDED])
@torch.no_grad()
def test_a_token_alone_is_what_it_is_among_others(method, kind):
    """Alone it reads what it keeps, its experts' too; among others there are zeros in products of everything."""
    more = {"reglu": {"mlp": "reglu"}, "layernorm": {"norm": "layernorm"}}
    model = rack(kind) if kind in KINDS else random_rack(tiny(**more[kind]), torch.float64)
    for place, selector in install(model, method, SparseRows()).items():
        selector.choice = half(method, input_size(model.config, *place))
    x_BTD = torch.randn(1, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for block in model.blocks:
        alone = torch.cat([block.attention.qkv(x_BTD[:, t : t + 1]) for t in range(9)], dim=1)
        torch.testing.assert_close(alone, block.attention.qkv(x_BTD), rtol=1e-12, atol=1e-12)
        alone = torch.cat([block.mlp(*[x_BTD[:, t : t + 1]] * 2) for t in range(9)], dim=1)
        torch.testing.assert_close(alone, block.mlp(x_BTD, x_BTD), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["gqa", "biases", "gelu", "mixtral", "some dense"])
@torch.no_grad()
def test_projections_that_tell_each_other_what_is_kept_compute_the_same(kind, monkeypatch):
    """Token by token each makes the list for the next; all at once nobody does."""
    model = rack(kind)
    for place, selector in install(model, "grouped", SparseRows()).items():
        selector.choice = half("grouped", input_size(model.config, *place))
    together = model(TEXT[:1])
    listed = []
    monkeypatch.setattr(linear, "list_groups", lambda *given: listed.append(given) or list_groups(*given))
    attends = growing_attends(model.config.n_blocks)
    alone = [model(TEXT[:1, t : t + 1], positions_T=torch.tensor([t]), attends=attends) for t in range(TEXT.shape[1])]
    torch.testing.assert_close(torch.cat(alone, 1), together, rtol=1e-9, atol=1e-9)
    # o tells up, gated up tells down, down tells the next Block's q, k and v; experts and what is not joined do not
    told = {"gqa": 3 + 3 + 2, "biases": 3 + 2, "gelu": 3 + 2, "mixtral": 0, "some dense": 2 + 2}[kind]
    asked = sum(isinstance(module, linear.SparseLinear) for module in model.modules())
    assert len(listed) == (asked - told) * TEXT.shape[1]


@pytest.mark.parametrize("kind", ["gqa", "mixtral"])
@torch.no_grad()
def test_groups_are_on_the_device_of_the_model(kind):
    model = rack(kind).to("meta")
    for place, selector in install(model, "grouped", SparseRows()).items():
        selector.choice = half("grouped", input_size(model.config, *place))
        assert {selector.groups.keep_G.device.type, selector.groups.first_G.device.type} == {"meta"}, place


@torch.no_grad()
def test_a_list_of_another_token_is_not_taken():
    model = rack("gqa")
    for place, selector in install(model, "grouped", SparseRows()).items():
        selector.choice = half("grouped", input_size(model.config, *place))
    o, up = model.blocks[0].attention.o, model.blocks[0].mlp.up
    one, other = torch.randn(2, 1, 1, 16, dtype=torch.float64)
    expected = up(other)
    o(one, one)  # tells the next one what is kept of what it makes, which never comes there
    assert torch.equal(up(other), expected)
