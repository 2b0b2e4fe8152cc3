"""Summed losses over batches, and bits per byte."""

import math

import pytest
import torch

from raygrow.nn.config import ModelConfig
from raygrow.nn.init import init_weights
from raygrow.nn.rack import Rack
from raygrow.nn.score import bits_per_byte, sum_loss


def test_the_sum_over_batches_is_that_of_all_tokens() -> None:
    config = ModelConfig(vocab_size=48, d_model=32, n_heads=2, d_ff=64, blocks_per_stack=1)
    rack = Rack(config)
    init_weights(rack, config, seed=0)
    tokens_BT, targets_BT = torch.randint(0, 48, (2, 3, 9))
    targets_BT[1, 4:] = -100
    batches = zip(tokens_BT.split(2), targets_BT.split(2), strict=True)
    total, count = sum_loss(rack, batches)
    with torch.no_grad():
        logits_NV = rack(tokens_BT).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits_NV, targets_BT.flatten(), reduction="sum")
    assert count == 22
    assert float(total) == pytest.approx(float(expected), rel=1e-5)


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(ValueError, match="no batch"):
        sum_loss(torch.nn.Identity(), [])


def test_a_byte_level_model_of_uniform_bytes_needs_eight_bits() -> None:
    assert bits_per_byte(math.log(256), bytes_per_token=1) == pytest.approx(8)
    assert bits_per_byte(math.log(256), bytes_per_token=4) == pytest.approx(2)
