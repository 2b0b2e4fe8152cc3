"""Random numbers in grown tensors: what they are drawn from, and that they are the same whoever draws them."""

import pytest
import torch

from raygrow.weights.fills import Fresh, NoisePairs, Redraw, mean_and_std

MATRIX = torch.randn(64, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def pairs(copies: int, **settings) -> NoisePairs:
    return NoisePairs(**{"copies": copies, "snr_db": 10.0, "key": "w", "seed": 0} | settings)


@pytest.mark.parametrize("copies", [2, 3, 4, 5])
def test_noise_cancels_in_pairs_of_column_copies_and_leaves_an_odd_one_alone(copies):
    tiled = MATRIX.repeat(2, copies)
    noise = (pairs(copies).apply(tiled, {}) - tiled).chunk(copies, dim=1)
    for plus, minus in zip(noise[0 : copies - 1 : 2], noise[1::2], strict=True):
        assert plus.abs().min() > 0
        torch.testing.assert_close(plus, -minus)
        # each copy of a row has noise of its own
        assert (plus[:64] - plus[64:]).abs().min() > 0
    assert copies % 2 == 0 or not noise[-1].any()
    assert copies < 4 or not torch.equal(noise[0], noise[2])


@pytest.mark.parametrize("snr_db", [10.0, 20.0])
def test_noise_is_as_far_below_the_matrix_as_asked(snr_db):
    tiled = MATRIX.repeat(1, 2) / 2
    noise = pairs(2, snr_db=snr_db).apply(tiled, {}) - tiled
    assert float(20 * (tiled.std() / noise.std()).log10()) == pytest.approx(snr_db, abs=0.2)


def test_noise_follows_key_and_seed_alone():
    tiled = MATRIX.repeat(1, 2)
    before = tiled.clone()
    noisy = pairs(2).apply(tiled, {})
    assert torch.equal(noisy, pairs(2).apply(tiled, {}))
    assert torch.equal(tiled, before)
    assert not torch.equal(noisy, pairs(2, key="v").apply(tiled, {}))
    assert not torch.equal(noisy, pairs(2, seed=1).apply(tiled, {}))
    assert torch.equal(pairs(2).apply(tiled.bfloat16(), {}), pairs(2).apply(tiled.bfloat16(), {}))
    assert pairs(2).apply(tiled.bfloat16(), {}).dtype == torch.bfloat16


@pytest.mark.parametrize("axis", [0, 1])
def test_a_redraw_takes_mean_and_deviation_from_what_it_replaces(axis):
    matrix = torch.randn(400, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = matrix * 3 + 5 + torch.arange(400) / 10
    redrawn = Redraw(axis, 0.25, "units", "w", 0).apply(matrix, {})
    changed = (redrawn != matrix).all(1 - axis)
    assert torch.equal(changed, (redrawn != matrix).any(1 - axis))
    assert changed.sum() == 100
    before, after = (x.index_select(axis, changed.nonzero().flatten()) for x in (matrix, redrawn))
    assert float(after.mean()) == pytest.approx(float(before.mean()), rel=0.02)
    assert float(after.std()) == pytest.approx(float(before.std()), rel=0.02)


def test_redraws_agree_on_the_slices_by_their_key():
    def changed(axis: int, **settings) -> list[int]:
        fill = Redraw(**{"axis": axis, "share": 0.5, "slices_key": "units", "key": "w", "seed": 0} | settings)
        matrix = torch.zeros(8, 8) + torch.randn(8, 8) + torch.arange(64).reshape(8, 8)
        return (fill.apply(matrix, {}) != matrix).all(1 - axis).nonzero().flatten().tolist()

    assert changed(0) == changed(1, key="v")
    assert changed(0) != changed(0, slices_key="others")
    assert changed(0) != changed(0, seed=1)
    assert len(changed(0, share=0.01)) == 1


def test_a_fresh_tensor_has_the_dtype_of_the_one_it_is_like():
    fill = Fresh((300, 20), 0.1, "norm", "router", 0)
    fresh = fill.apply(None, {"norm": torch.ones(3, dtype=torch.bfloat16)})
    assert (fresh.dtype, fresh.shape) == (torch.bfloat16, (300, 20))
    assert float(fresh.float().std()) == pytest.approx(0.1, rel=0.05)
    assert torch.equal(fresh, fill.apply(None, {"norm": torch.ones(3)}).bfloat16())


def test_on_meta_tensors_fills_give_shapes():
    meta = torch.empty(8, 6, device="meta", dtype=torch.bfloat16)
    fresh = Fresh((3, 2), 0.1, "like", "router", 0).apply(None, {"like": meta})
    assert (fresh.is_meta, fresh.shape, fresh.dtype) == (True, (3, 2), torch.bfloat16)
    for fill in (pairs(2), Redraw(0, 0.5, "units", "w", 0)):
        assert fill.apply(meta, {}).is_meta
        assert fill.apply(meta, {}).shape == (8, 6)


def test_mean_and_deviation_are_those_of_the_population():
    mean, std = mean_and_std(MATRIX.float())
    assert mean == pytest.approx(float(MATRIX.mean()), abs=1e-7)
    assert std == pytest.approx(float(MATRIX.std(correction=0)), rel=1e-6)
    assert mean_and_std(torch.tensor([3.0])) == (3.0, 0.0)
