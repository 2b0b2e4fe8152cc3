"""What a growth operator gives back: the grown model's config and how to make its tensors."""

from dataclasses import dataclass

from raygrow.nn.config import ModelConfig
from raygrow.weights.rules import Rules


@dataclass(frozen=True, kw_only=True)
class Growth:
    """One growth of one model. Nothing is computed yet; the rules can be applied to any kind of tensor."""

    config: ModelConfig
    """Of the grown model."""
    rules: Rules
    """For every parameter of the grown model, how it is made from those of the source."""
    exact: bool
    """Whether the grown model computes the same function as its source; the verifier holds it to that."""
    origins: tuple[int, ...]
    """For each Block of the grown model, the Block of the source that it comes from."""


def refuse_adapters(config: ModelConfig) -> None:
    """Adapters fit the two Blocks that they stand between, and the width that both have.

    Raises:
        ValueError: If the model has any.
    """
    if config.rotation == "block":
        raise ValueError(
            "rotation='block': a model with adapters between its Blocks grows neither deeper nor wider; grow the model "
            "that it was made from, then make that one sparse"
        )
