"""A model in other bases computes what it did, whatever its shape, gains and biases."""

import pytest
import torch
from torch import Tensor

from raygrow.sparsity.absorb import absorb_rules, absorbed_config
from raygrow.sparsity.calibrate import calibrate
from raygrow.sparsity.rotation import block_bases, global_basis, principal_basis
from raygrow.weights.apply import Derived
from raygrow.weights.shapes import meta_rack
from tests.sparsity.racks import KINDS, TEXT, rack, tensors

CPU = torch.device("cpu")


def random_bases(n: int, size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q for _ in range(n)]


def absorbed(model, bases, rotation):
    rules = absorb_rules(model.config, bases, rotation, CPU)
    turned = meta_rack(absorbed_config(model.config, rotation))
    turned.load_state_dict(dict(Derived(rules, tensors(model))), assign=True)
    return turned


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("rotation", ["global", "block"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_rotated_model_is_the_model(kind, rotation, dtype, tolerance):
    model = rack(kind, dtype)
    bases = random_bases(model.config.n_blocks, 16)
    turned = absorbed(model, bases if rotation == "block" else bases[:1] * len(bases), rotation)
    expected = model(TEXT)
    assert (turned(TEXT) - expected).abs().max() <= tolerance * expected.abs().max()
    assert all(bool((block.mlp_norm.weight == 1).all()) for block in turned.blocks)
    assert not torch.allclose(turned.blocks[0].attention.q.weight, model.blocks[0].attention.q.weight)


@torch.no_grad()
def test_the_residual_stream_is_that_of_the_model_in_each_blocks_basis():
    model = rack("mixtral")
    bases = random_bases(3, 16)
    turned = absorbed(model, bases, "block")
    found: list[list[Tensor]] = [[], []]
    for kept, each in zip(found, (model, turned), strict=True):
        for block in each.blocks:
            block.register_forward_pre_hook(lambda _, inputs, kept=kept: kept.append(inputs[0]))
        each(TEXT)
    for before, after, q_DD in zip(*found, bases, strict=True):
        torch.testing.assert_close(after, before @ q_DD, rtol=1e-9, atol=1e-9)


def test_the_calibrated_basis_puts_most_energy_into_the_first_entries_and_makes_them_uncorrelated():
    model = rack("gqa")
    moments = list(calibrate(model.config, tensors(model), TEXT, device=CPU))
    bases = block_bases(moments, CPU)
    for q_DD in bases:
        torch.testing.assert_close(q_DD.T @ q_DD, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-12)
    turned = absorbed(model, bases, "block")
    for block in calibrate(turned.config, tensors(turned), TEXT, device=CPU):
        moment = block["attention"] + block["mlp"]
        energy = moment.diagonal()
        assert (moment - energy.diag()).abs().max() < 1e-9 * energy.max()
        assert torch.equal(energy, energy.sort(descending=True).values)


def test_moments_are_those_of_the_whole_model():
    model, seen = rack("some dense"), []
    block = model.blocks[1]
    block.attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(TEXT)
    found = list(calibrate(model.config, tensors(model), TEXT, device=CPU, batch_size=3))[1]
    x_ND = seen[0].flatten(0, 1) / block.attention_norm.weight
    torch.testing.assert_close(found["attention"], x_ND.T @ x_ND)


def test_one_basis_for_all_is_that_of_the_summed_moments():
    model = rack("mha")
    moments = list(calibrate(model.config, tensors(model), TEXT, device=CPU))
    bases = global_basis(moments, model.config, CPU)
    total = sum(moment for block in moments for moment in block.values())
    assert len(bases) == 3
    torch.testing.assert_close(bases[0], principal_basis(total), rtol=1e-8, atol=1e-8)
    assert bases[1] is bases[0]


def test_directions_without_energy_come_last_and_the_basis_stays_orthogonal():
    x_ND = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    q_DD = principal_basis(x_ND.T @ x_ND)
    torch.testing.assert_close(q_DD.T @ q_DD, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (x_ND @ q_DD)[:, 3:].abs().max() < 1e-7
    assert torch.equal(principal_basis(torch.zeros(4, 4, dtype=torch.float64)).abs().sum(0), torch.ones(4).double())
