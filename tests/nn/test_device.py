"""Where a model is computed: what is there is taken, what is not is named."""

import pytest
import torch

from raygrow.nn.device import choose_device


def test_what_is_asked_for_is_taken() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99", "cpu:cpu"])
def test_a_device_that_is_not_there_is_named_with_those_that_are(device: str) -> None:
    with pytest.raises(ValueError, match=rf"^device={device}: nothing can be computed there, only on cpu"):
        choose_device(device)
