"""Upcycling: what experts and router are, exactness to the bit, how gradients follow, whether experts part."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from raygrow.growth.experts import Experts
from raygrow.growth.model import grow_model
from raygrow.growth.width import Width
from raygrow.nn.config import ModelConfig
from raygrow.weights.apply import Derived
from raygrow.weights.moments import moment_rules
from tests.growth.racks import TOKENS, gradients, random_rack, tiny

MIXED = {"n_experts": 4, "top_k": 2, "d_expert": 24}


@pytest.mark.parametrize("mlp", ["swiglu", "gelu", "reglu"])
def test_every_expert_is_the_dense_mlp(mlp):
    source = random_rack(tiny(mlp=mlp, mlp_bias=True))
    grown = grow_model(source, Experts(n_experts=4, blocks=(0, 2)))
    assert grown.config == replace(source.config, n_experts=4, top_k=2, d_expert=24, dense_blocks=(1,))
    ours = grown.state_dict()
    for name, tensor in source.state_dict().items():
        if name.startswith(("blocks.0.mlp.", "blocks.2.mlp.")):
            experts = ours.pop(name.replace(".mlp.", ".mlp.experts."))
            assert torch.equal(experts, torch.stack([tensor] * 4))
        else:
            assert torch.equal(ours.pop(name), tensor)
    assert sorted(ours) == ["blocks.0.mlp.router.weight", "blocks.2.mlp.router.weight"]


def test_the_router_is_drawn_anew_for_every_block_and_seed():
    source = random_rack(tiny(d_model=64, n_heads=4, head_dim=4))

    def routers(**settings) -> list[Tensor]:
        grown = grow_model(source, Experts(n_experts=16, **settings))
        return [block.mlp.router.weight.detach() for block in grown.blocks]

    one, other, _ = routers()
    assert not torch.equal(one, other)
    assert not torch.equal(one, routers(seed=1)[0])
    assert torch.equal(one, routers()[0])
    assert one.std() == pytest.approx(0.02, rel=0.1)
    torch.testing.assert_close(routers(router_std=0.5)[0], 25 * one)
    assert not routers(router_std=0)[0].any()


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
@torch.no_grad()
def test_two_equal_experts_under_a_zero_router_are_the_dense_mlp_to_the_bit(mlp):
    source = random_rack(tiny(mlp=mlp, mlp_bias=True), torch.float32)
    grown = grow_model(source, Experts(n_experts=8, top_k=2, router_std=0))
    assert torch.equal(grown(TOKENS), source(TOKENS))


@pytest.mark.parametrize("mlp", ["swiglu", "gelu", "reglu", "relu", "relu2"])
@torch.no_grad()
def test_shares_of_all_experts_are_made_up_for_by_scaled_weights(mlp):
    source = random_rack(tiny(mlp=mlp, mlp_bias=True, blocks_per_stack=1))
    operator = Experts(n_experts=8, top_k=2, norm_topk_prob=False, router_std=0)
    assert not operator.grow(source.config).exact
    grown = grow_model(source, operator)
    dense, experts = source.blocks[0].mlp, grown.blocks[0].mlp.experts
    scale = 4 ** (1 / 2 if mlp in ("gelu", "relu") else 1 / 3)
    torch.testing.assert_close(experts.up.weight[3], dense.up.weight * scale)
    torch.testing.assert_close(experts.up.bias[3], dense.up.bias * scale)
    torch.testing.assert_close(experts.down.weight[3], dense.down.weight * scale)
    torch.testing.assert_close(experts.down.bias[3], dense.down.bias * 4)
    if mlp in ("reglu", "relu", "relu2"):  # with these, equal experts of equal weight are the dense model
        torch.testing.assert_close(grown(TOKENS), source(TOKENS), rtol=1e-10, atol=1e-10)


def test_drop_redraws_the_same_hidden_units_of_gate_up_and_down_and_others_in_each_expert():
    source = random_rack(tiny(mlp_bias=True, d_ff=64))
    grown = grow_model(source, Experts(n_experts=4, drop=0.25))
    assert not Experts(n_experts=4, drop=0.25).grow(source.config).exact
    for block in range(3):
        dense, experts = source.blocks[block].mlp, grown.blocks[block].mlp.experts
        redrawn = [
            (experts.gate.weight != dense.gate.weight).all(2),
            (experts.gate.bias != dense.gate.bias),
            (experts.up.weight != dense.up.weight).all(2),
            (experts.up.bias != dense.up.bias),
            (experts.down.weight != dense.down.weight).all(1),
        ]
        (units_EF,) = {tuple(map(tuple, units_EF.tolist())) for units_EF in redrawn}
        assert [sum(units_F) for units_F in units_EF] == [16] * 4
        assert len(set(units_EF)) == 4
        # what is not redrawn is copied
        kept_EF = ~torch.tensor(units_EF)
        assert torch.equal(experts.up.weight[kept_EF], torch.stack([dense.up.weight] * 4)[kept_EF])
        assert torch.equal(experts.down.bias, torch.stack([dense.down.bias] * 4))


SCALED = {"router_std": 0, "norm_topk_prob": False}


@pytest.mark.parametrize(
    ("mlp", "settings"),
    [
        *((mlp, {"router_std": router_std}) for mlp in ("swiglu", "gelu") for router_std in (0, 0.5)),
        *((mlp, SCALED) for mlp in ("reglu", "relu", "relu2")),  # with these the function is kept
    ],
)
def test_the_gradients_of_all_experts_add_up_to_that_of_the_dense_mlp(mlp, settings):
    source, operator = random_rack(tiny(mlp=mlp, mlp_bias=True)), Experts(n_experts=4, **settings)
    theirs, ours = gradients(source), gradients(grow_model(source, operator))
    rules = operator.grow(source.config).rules
    m_rules = moment_rules(rules, "exp_avg", "copy")
    assert rules.keys() - m_rules.keys() == {f"blocks.{block}.mlp.router.weight" for block in range(3)}
    for name, rule in m_rules.items():
        expected, gradient = rule.apply(theirs), ours[name]
        if ".experts." in name:
            # which expert sees which token is the router's choice; each is given an even share
            assert torch.equal(expected[0], expected[3])
            expected, gradient = expected.sum(0), gradient.sum(0)
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_experts_part_and_are_all_used_after_two_hundred_steps():
    model = grow_model(random_rack(tiny(blocks_per_stack=2), torch.float32), Experts(n_experts=4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    loads_LE = torch.zeros(2, 4)
    for step in range(200):
        # counting upward from anywhere, in steps that the first two tokens show
        start, stride = (
            torch.randint(0, 50, (8, 1), generator=generator),
            torch.randint(1, 4, (8, 1), generator=generator),
        )
        tokens = (start + stride * torch.arange(17)) % 50
        loss = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.objective(load_balancing=0.01).div(tokens[:, 1:].numel()).backward()
        optimizer.step()
        if step >= 150:
            loads_LE += loss.load_LE
    for block in model.blocks:
        experts_EP = block.mlp.experts.up.weight.detach().flatten(1)
        apart_EE = torch.cdist(experts_EP, experts_EP) / experts_EP.norm(dim=1)
        assert apart_EE[~torch.eye(4, dtype=torch.bool)].min() > 0.05
    assert (loads_LE / loads_LE.mean(1, keepdim=True)).min() > 0.2


class Recorder(Mapping[str, Tensor]):
    """Tensors, and the names of those that were asked for."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.asked = tensors, []

    def __getitem__(self, name: str) -> Tensor:
        self.asked.append(name)
        return self.tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_one_expert_is_taken_through_a_chain_of_tables_without_the_others(drop):
    source = random_rack(tiny())
    recorder = Recorder(dict(source.named_parameters()))
    first = Experts(n_experts=4, drop=drop).grow(source.config)
    second = Width(factor=2).grow(first.config)
    chain = Derived(second.rules, Derived(first.rules, recorder))
    for matrix in ("gate", "up", "down"):
        stacked, name = f"blocks.1.mlp.experts.{matrix}.weight", f"blocks.1.mlp.{matrix}.weight"
        recorder.asked.clear()
        expert = chain.take(stacked, 2)
        assert recorder.asked == [name]
        assert torch.equal(expert, chain[stacked][2])


@pytest.mark.parametrize("operator", [Experts(n_experts=4), Experts(n_experts=6, top_k=3, blocks=(2, 0), drop=0.5)])
@pytest.mark.parametrize("settings", [{}, {"n_kv_heads": 2, "mlp": "gelu", "n_stacks": 3, "blocks_per_stack": 1}])
def test_growing_what_was_shrunk_gives_the_target(operator, settings):
    dense = tiny(**settings)
    target = operator.grow(dense).config
    assert operator.shrink(target) == dense
    assert operator.grow(operator.shrink(target)).config == target


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_experts": 1, "top_k": 2}, "n_experts=1: fewer than top_k=2"),
        ({"n_experts": 0}, "n_experts=0"),
        ({"top_k": 1.5}, r"top_k=1\.5"),
        ({"drop": 1.5}, r"drop=1\.5"),
        ({"router_std": -1.0}, r"router_std=-1\.0"),
        ({"router_std": float("nan")}, "router_std=nan"),
        ({"blocks": ()}, r"blocks=\[\]: must be `all` or a list of different blocks"),
        ({"blocks": (1, 1)}, r"blocks=\[1, 1\]"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Experts(**settings)


@pytest.mark.parametrize(
    ("operator", "config", "message"),
    [
        (Experts(), tiny(**MIXED), "n_experts=4: the model has experts already"),
        (Experts(blocks=(0, 3)), tiny(), r"blocks=\[0, 3\]: the model has no block 3, only 3"),
        (Experts(blocks=(-1,)), tiny(), r"blocks=\[-1\]: the model has no block -1"),
    ],
)
def test_a_source_that_cannot_be_upcycled_is_refused(operator, config, message):
    with pytest.raises(ValueError, match=message):
        operator.grow(config)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (tiny(), "n_experts=0: growth to 4 experts gives n_experts=4"),
        (tiny(**MIXED | {"n_experts": 8}), "n_experts=8"),
        (tiny(**MIXED | {"top_k": 1}), "top_k=1"),
        (tiny(**MIXED | {"d_expert": 12}), "d_expert=12: .* gives d_expert=24"),
        (tiny(**MIXED, norm_topk_prob=False), "norm_topk_prob=False"),
        (tiny(**MIXED, dense_blocks=(0,)), r"dense_blocks=\(0,\)"),
    ],
)
def test_a_target_with_other_experts_is_refused(target: ModelConfig, message):
    with pytest.raises(ValueError, match=message):
        Experts(n_experts=4).shrink(target)
