"""Gstack: depth growth by stacking the whole model on itself (arXiv 2405.15319).

    source        M = [0 1 2]
    factor 3      M o M o M = [0 1 2  0 1 2  0 1 2]

Embedding, final norm and head are copied. The function changes, so the loss rises for a while after growth; rotary
positions have no parameters and need nothing.
"""

from dataclasses import dataclass
from typing import Literal

from raygrow.growth.blocks import grow_blocks, shrink_blocks
from raygrow.growth.growth import Growth
from raygrow.nn.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Gstack:
    """Makes a model `factor` times as deep: block i of the target is block `i mod n_blocks` of the source.

    Raises:
        ValueError: If the factor is not an integer of at least 1.
    """

    operator: Literal["gstack"] = "gstack"
    factor: int = 4
    """Copies of the model put on top of each other. The paper recommends 4 and finds the best between 2 and 4."""

    def __post_init__(self) -> None:
        if type(self.factor) is not int or self.factor < 1:
            raise ValueError(f"growth factor={self.factor!r}: gstack needs an integer of at least 1")

    def grow(self, config: ModelConfig) -> Growth:
        """The growth of a model of this config: `factor` times the Stacks, each as large as before."""
        origins = tuple(range(config.n_blocks)) * self.factor
        return grow_blocks(config, origins, n_stacks=config.n_stacks * self.factor)

    def shrink(self, target: ModelConfig) -> ModelConfig:
        """The config that grows into `target`, with whole Stacks where they divide, else as a single Stack.

        `grow(shrink(target)).config` has the Blocks of `target`, and its grouping too where `factor` divides
        `n_stacks`.

        Raises:
            ValueError: If the target's Blocks are not a multiple of the factor, or copies of one Block differ in kind.
        """
        n_blocks, left = divmod(target.n_blocks, self.factor)
        if left:
            raise ValueError(
                f"growth factor={self.factor} does not divide the target's {target.n_blocks} blocks: choose a factor "
                "that divides n_stacks * blocks_per_stack, or change those"
            )
        n_stacks = 1 if target.n_stacks % self.factor else target.n_stacks // self.factor
        return shrink_blocks(target, tuple(range(n_blocks)) * self.factor, n_stacks=n_stacks)
