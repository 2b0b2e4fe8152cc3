"""Width growth: what the tensors are, how gradients follow, when copies part, what is refused."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from raygrow.growth.model import grow_model
from raygrow.growth.width import Width
from raygrow.nn.rack import Rack
from raygrow.weights.moments import Policy, moment_rules
from tests.growth.racks import TOKENS, gradients, random_rack, tiny

QUIET = Width(factor=2, noise_snr_db=0)


def test_matrices_are_tiled_and_divided_by_the_copies_they_read():
    source = random_rack(tiny(n_kv_heads=2, qk_norm=True, attention_bias=True, mlp_bias=True))
    theirs = source.state_dict()
    ours = grow_model(source, Width(factor=3, heads=2, d_ff=4, noise_snr_db=0)).state_dict()
    tiles = {
        "embedding.weight": ((1, 3), 1),
        "norm.weight": ((3,), 1),
        "head.weight": ((1, 3), 3),
        "blocks.1.attention_norm.weight": ((3,), 1),
        "blocks.1.attention.q.weight": ((2, 3), 3),
        "blocks.1.attention.k.bias": ((2,), 1),
        "blocks.1.attention.q_norm.weight": ((1,), 1),
        "blocks.1.attention.o.weight": ((3, 2), 2),
        "blocks.1.attention.o.bias": ((3,), 1),
        "blocks.1.mlp.gate.weight": ((4, 3), 3),
        "blocks.1.mlp.up.bias": ((4,), 1),
        "blocks.1.mlp.down.weight": ((3, 4), 4),
    }
    for name, (copies, divisor) in tiles.items():
        torch.testing.assert_close(ours[name], theirs[name].tile(copies) / divisor)


def test_the_grown_config_keeps_the_size_and_the_groups_of_heads():
    config = tiny(n_heads=6, n_kv_heads=2, head_dim=4, n_experts=3, top_k=1, d_expert=10, tie_embeddings=True)
    grown = Width(factor=3, heads=2).grow(config).config
    assert grown == replace(
        config, d_model=48, n_heads=12, n_kv_heads=4, d_ff=72, d_expert=30, logit_scale=config.logit_scale / 3
    )


@torch.no_grad()
def test_an_untied_head_takes_the_logit_scale_in():
    source = random_rack(tiny(tie_embeddings=True, logit_scale=0.5))
    grown = grow_model(source, Width(factor=2, untie=True))
    assert (grown.config.tie_embeddings, grown.config.logit_scale) == (False, 1.0)
    assert torch.equal(grown.head_weight, source.embedding.weight.tile(1, 2) / 4)
    torch.testing.assert_close(grown(TOKENS), source(TOKENS), rtol=1e-10, atol=1e-12)
    # by a factor of 1 too: a way to a model that transformers can open
    torch.testing.assert_close(grow_model(source, Width(factor=1, untie=True))(TOKENS), source(TOKENS))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("operator", [QUIET, Width(factor=3, heads=2, d_ff=1, noise_snr_db=0)])
def test_gradients_after_growth_are_those_that_the_table_gives(operator, experts, tied):
    config = tiny(
        n_kv_heads=2, qk_norm=True, attention_bias=True, mlp_bias=True, tie_embeddings=tied, norm="layernorm",
        n_experts=experts, top_k=2 if experts else 0, dense_blocks=(1,) if experts else (),
    )  # fmt: skip
    source = random_rack(config)
    theirs, ours = gradients(source), gradients(grow_model(source, operator))
    rules = operator.grow(config).rules
    m_rules, v_rules = (moment_rules(rules, moment, "copy") for moment in ("exp_avg", "exp_avg_sq"))
    assert m_rules.keys() == v_rules.keys() == ours.keys()
    squares = {name: gradient.square() for name, gradient in theirs.items()}
    for name, gradient in ours.items():
        largest = gradient.abs().max()
        assert (m_rules[name].apply(theirs) - gradient).abs().max() <= 1e-10 * largest, name
        assert (v_rules[name].apply(squares) - gradient.square()).abs().max() <= 1e-10 * largest**2, name


def test_an_untied_model_shares_its_one_gradient_between_embedding_and_head():
    source = random_rack(tiny(tie_embeddings=True, logit_scale=0.5))
    theirs, ours = gradients(source), gradients(grow_model(source, Width(factor=2, untie=True, noise_snr_db=0)))
    embedding, head = ours.pop("embedding.weight"), ours.pop("head.weight")
    # what either sees is the source's gradient in that role, in the proportion that its rule states
    rules = Width(factor=2, untie=True, noise_snr_db=0).grow(source.config).rules
    shares = [rules[name].terms[0].gradient for name in ("embedding.weight", "head.weight")]
    both = embedding[:, :16] / shares[0] + head[:, :16] / shares[1]
    torch.testing.assert_close(both, theirs["embedding.weight"], rtol=1e-10, atol=1e-12)
    m_rules = moment_rules(rules, "exp_avg", "copy")
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, m_rules[name].apply(theirs), rtol=1e-10, atol=1e-12)


def divergence(model: Rack) -> float:
    """How far the two copies of every query head are apart in what they compute, relative to its size.

    The columns' copies are added up, as equal inputs add them up: so the noise of growth does not count.
    """
    halves = [block.attention.q.weight.detach().unflatten(1, (2, -1)).sum(1).chunk(2) for block in model.blocks]
    return max(float((one - other).norm() / one.norm()) for one, other in halves)


def train(model: Rack, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 50, (2, 17), generator=generator)
        optimizer.zero_grad()
        model(tokens[:, :-1], tokens[:, 1:]).nats.div(32).backward()
        optimizer.step()


def adamw(model: Rack) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def test_noise_lets_heads_part_within_twenty_steps():
    model = grow_model(random_rack(tiny(), torch.float32), Width(factor=2, noise_snr_db=10))
    assert divergence(model) < 1e-6
    train(model, adamw(model), 20)
    assert divergence(model) > 1e-2


def trained_after_growth(policy: Policy) -> Rack:
    """A model that was trained, grown without noise, and trained on with Adam's moments taken over."""
    source = random_rack(tiny())
    before = adamw(source)
    train(source, before, 5)
    model, rules = grow_model(source, QUIET), QUIET.grow(source.config).rules
    optimizer = adamw(model)
    named = dict(model.named_parameters())
    theirs = {name: before.state[parameter] for name, parameter in source.named_parameters()}
    for moment in ("exp_avg", "exp_avg_sq"):
        moments = {name: state[moment] for name, state in theirs.items()}
        for name, rule in moment_rules(rules, moment, policy).items():
            optimizer.state[named[name]][moment] = rule.apply(moments).clone()
            optimizer.state[named[name]]["step"] = theirs[rule.sources[0]]["step"].clone()
    train(model, optimizer, 20)
    return model


def test_without_noise_copies_stay_together_unless_only_the_first_keeps_its_momentum():
    assert divergence(trained_after_growth("copy")) < 1e-8
    assert divergence(trained_after_growth("asymmetric")) > 1e-3


@pytest.mark.parametrize(
    ("operator", "settings"),
    product(
        [Width(factor=2), Width(factor=3, d_model=2, heads=1), Width(factor=1, heads=2)],
        [
            {},
            {"n_kv_heads": 2, "n_stacks": 3},
            {"tie_embeddings": True, "logit_scale": 0.5},
            {"n_experts": 4, "top_k": 2, "d_expert": 12, "dense_blocks": (0,)},
            {"n_heads": 2, "head_dim": 20, "qk_norm": True, "logit_scale": 0.25},
        ],
    ),
)
def test_growing_what_was_shrunk_gives_the_target(operator, settings):
    target = tiny(**settings)
    source = operator.shrink(target)
    assert operator.grow(source).config == target
    assert source.head_dim == target.head_dim


def test_an_untying_growth_comes_from_a_tied_model():
    source = Width(factor=2, untie=True).shrink(tiny())
    assert source == replace(tiny(), d_model=8, n_heads=2, n_kv_heads=2, d_ff=12, tie_embeddings=True)
    assert Width(factor=2, untie=True).grow(source).config == tiny()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factor": 1.5}, r"factor=1\.5: width grows by whole factors"),
        ({"factor": 0}, "factor=0: width grows by whole factors"),
        ({"factor": True}, "factor=True"),
        ({"heads": -1}, "heads=-1"),
        ({"d_ff": 2.0}, r"d_ff=2\.0"),
        ({"noise_snr_db": -3.0}, r"noise_snr_db=-3\.0"),
        ({"noise_snr_db": float("nan")}, "noise_snr_db=nan"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Width(**settings)


@pytest.mark.parametrize(
    ("operator", "target", "message"),
    [
        (Width(factor=3), {}, "d_model=16: width grows by whole factors, and growth d_model=3 does not divide it"),
        (Width(factor=1, d_ff=5), {}, "d_ff=24: .* growth d_ff=5 does not divide it"),
        (Width(factor=2), {"n_heads": 1}, "n_heads=1"),
        (Width(factor=2), {"n_kv_heads": 1}, "n_kv_heads=1: grouped-query attention cannot be kept"),
        (Width(factor=2), {"n_experts": 2, "top_k": 1, "d_expert": 5}, "d_expert=5"),
        (Width(untie=True), {"tie_embeddings": True}, "untie=true: gives a model with tie_embeddings=false"),
        (Width(untie=True), {"logit_scale": 0.5}, r"logit_scale=0\.5"),
    ],
)
def test_a_target_that_cannot_have_been_grown_is_refused(operator, target, message):
    with pytest.raises(ValueError, match=message):
        operator.shrink(tiny(**target))


def test_an_untied_model_cannot_be_untied():
    with pytest.raises(ValueError, match="untie=true: the model's embedding and head are separate already"):
        Width(untie=True).grow(tiny())
