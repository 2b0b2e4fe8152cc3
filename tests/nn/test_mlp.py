"""MLPs whose hidden units can be zero: what they compute, and what they say of their units.

Shapes: B batch, T tokens, D model, F hidden.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raygrow.nn.config import ModelConfig
from raygrow.nn.cost import parameters
from raygrow.nn.loss import Loss, add_losses
from raygrow.nn.mlp import mlp
from raygrow.nn.rack import Rack
from tests.growth.racks import TARGETS, TOKENS, random_rack, tiny

KINDS = {
    "reglu": {"mlp": "reglu"},
    "relu": {"mlp": "relu", "mlp_bias": True},
    "relu2": {"mlp": "relu2"},
    "experts": {"mlp": "reglu", "n_experts": 4, "top_k": 2, "d_expert": 20},
    "some dense": {"mlp": "relu2", "mlp_bias": True, "n_experts": 3, "top_k": 2, "dense_blocks": (0, 2)},
}


@pytest.mark.parametrize("kind", ["reglu", "relu", "relu2"])
def test_a_rectified_mlp_is_what_its_name_says(kind: str) -> None:
    layer = mlp(tiny(mlp=kind)).double()
    x_BTD = torch.randn(2, 5, 16, dtype=torch.float64)
    up_BTF = x_BTD @ layer.up.weight.T
    positive_BTF = up_BTF.clamp(min=0)
    hidden_BTF = {
        "reglu": lambda: (x_BTD @ layer.gate.weight.T).clamp(min=0) * up_BTF,
        "relu": lambda: positive_BTF,
        "relu2": lambda: positive_BTF * positive_BTF,
    }[kind]()
    torch.testing.assert_close(layer(x_BTD), hidden_BTF @ layer.down.weight.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_counted_as_they_are(kind: str) -> None:
    config = tiny(**KINDS[kind])
    assert parameters(config) == sum(p.numel() for p in Rack(config).parameters())


def hidden_units(model: Rack) -> list[list[Tensor]]:
    """Where the hidden units of every Block are put as it runs: of each token its own F, or K x F."""
    found: list[list[Tensor]] = [[] for _ in model.blocks]
    for units, block in zip(found, model.blocks, strict=True):
        down: nn.Module = block.mlp.get_submodule("down" if hasattr(block.mlp, "down") else "experts.down")
        down.register_forward_pre_hook(lambda module, inputs, units=units: units.append(inputs[0].flatten(0, -2)))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_size_and_share_are_means_over_units_and_blocks_summed_over_tokens(kind: str) -> None:
    model = random_rack(tiny(**KINDS[kind]))
    found = hidden_units(model)
    loss = model(TOKENS, TARGETS)
    units = [torch.cat(of_block).flatten() for of_block in found]
    sizes, shares = (
        [measure(x).item() for x in units]
        for measure in (lambda x: x.abs().mean(), lambda x: (x > 0).double().mean() + (x < 0).double().mean())
    )
    assert loss.activation.item() == pytest.approx(TOKENS.numel() * sum(sizes) / len(sizes), rel=1e-12)
    assert loss.active.item() == pytest.approx(TOKENS.numel() * sum(shares) / len(shares), rel=1e-12)
    assert 0.3 < sum(shares) / len(shares) < 0.7
    without = loss._replace(activation=None)
    assert (loss.objective(0.1, 0.5) - without.objective(0.1)).item() == pytest.approx(0.5 * loss.activation.item())


@pytest.mark.parametrize("kind", ["reglu", "some dense"])
def test_they_do_not_depend_on_how_sequences_fall_on_batches(kind: str) -> None:
    model = random_rack(tiny(**KINDS[kind]))
    tokens_BT, targets_BT = torch.randint(0, 50, (2, 5, 12), generator=torch.Generator().manual_seed(0))
    whole = model(tokens_BT, targets_BT)
    # the first sequence once more, with nothing to predict: it fills up the last batch
    tokens_BT, targets_BT = torch.cat((tokens_BT, tokens_BT[:1])), torch.cat((targets_BT, 0 * targets_BT[:1] - 100))
    parts = add_losses([model(*part) for part in zip(tokens_BT.split(2), targets_BT.split(2), strict=True)])
    torch.testing.assert_close(parts.activation, whole.activation, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.active, whole.active, rtol=1e-12, atol=0)
    for one, other in zip(gradients(model, parts), gradients(model, whole), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def gradients(model: Rack, loss: Loss) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss.objective(0.1, 3.0), list(model.parameters()))


def test_nothing_is_measured_where_nobody_asks() -> None:
    model = random_rack(tiny(mlp="reglu"))
    expected = model(TOKENS, TARGETS)
    with torch.no_grad():
        loss = model(TOKENS, TARGETS)
    assert loss.activation is None
    assert loss.active is None
    torch.testing.assert_close(loss.nats, expected.nats, rtol=1e-12, atol=0)
    assert random_rack(tiny())(TOKENS, TARGETS).active is None


def test_the_gradient_of_sizes_is_that_of_finite_differences() -> None:
    model = random_rack(tiny(mlp="reglu", n_experts=3, top_k=2, dense_blocks=(0,)))
    weight = model.blocks[1].mlp.experts.up.weight
    (gradient,) = torch.autograd.grad(model(TOKENS, TARGETS).activation, weight)
    direction = torch.randn_like(weight)

    def moved(by: float) -> float:
        with torch.no_grad():
            weight.add_(by * direction)
        value = model(TOKENS, TARGETS).activation.item()
        with torch.no_grad():
            weight.sub_(by * direction)
        return value

    assert (moved(1e-6) - moved(-1e-6)) / 2e-6 == pytest.approx((gradient * direction).sum().item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["reglu", "some dense"])
def test_traced_and_checkpointed_blocks_give_the_same_gradients(kind: str) -> None:
    model = random_rack(tiny(**KINDS[kind]), torch.float32)
    plain = gradients(model, model(TOKENS, TARGETS))
    for block in model.blocks:
        block.forward = torch.compile(checkpointed(block), fullgraph=True, dynamic=False, backend="aot_eager")
    traced = gradients(model, model(TOKENS, TARGETS))
    for (name, _), one, other in zip(model.named_parameters(), plain, traced, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def checkpointed(block: nn.Module):
    forward = block.forward
    return lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False)


def test_a_size_of_a_pressed_model_falls() -> None:
    config: ModelConfig = replace(tiny(mlp="relu2"), blocks_per_stack=1)
    model = random_rack(config, torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    first = model(TOKENS, TARGETS)
    for _ in range(60):
        loss = model(TOKENS, TARGETS)
        (loss.objective(0.0, 20.0) / TOKENS.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    last = model(TOKENS, TARGETS)
    assert last.activation < 0.2 * first.activation
    assert last.active < first.active
