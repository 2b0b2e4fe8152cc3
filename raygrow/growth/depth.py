"""Depth growth by a few Blocks: copies of chosen Blocks, as they are or silent.

    source               [0 1 2 3]
    extra_layers 2 of    last  [0 1 2 3 3 3]      back    [0 1 2 3 2 3]
                         middle [0 1 2 1 2 3]     spread  [0 0 1 2 2 3]

With `identity` a Block that comes up again has its output projections at zero, so that it adds nothing to the residual
stream and the function stays what it was (LLaMA Pro, arXiv 2401.02415). Without it the loss rises for a while.
"""

from dataclasses import dataclass
from typing import Literal

from raygrow.growth.blocks import grow_blocks, shrink_blocks
from raygrow.growth.growth import Growth
from raygrow.nn.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Depth:
    """Adds `extra_layers` Blocks, or builds the list of Blocks given in `blocks`.

    Raises:
        ValueError: If neither or both are given, or a number is negative.
    """

    operator: Literal["depth"] = "depth"
    extra_layers: int = 0
    """Blocks to add."""
    source: Literal["last", "middle", "back", "spread"] = "last"
    """Which Blocks the added ones copy: the last one again and again; a segment from the middle or the back, repeated
    right after itself; or evenly spread ones, each copied right after itself."""
    blocks: tuple[int, ...] = ()
    """Instead of `extra_layers`: for every Block of the grown model, the Block of the source that it copies."""
    identity: bool = False
    """Whether copies start without effect. The function is then kept, but they learn more slowly at first."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if type(self.extra_layers) is not int or self.extra_layers < 0:
            raise ValueError(f"extra_layers={self.extra_layers!r}: must be an integer of at least 1")
        if not all(type(block) is int and block >= 0 for block in self.blocks):
            raise ValueError(f"blocks={list(self.blocks)}: must be a list of source blocks, counted from 0")
        if bool(self.extra_layers) == bool(self.blocks):
            raise ValueError(
                f"extra_layers={self.extra_layers}, blocks={list(self.blocks)}: depth growth needs one of the two, "
                "a number of blocks to add or the list of all blocks"
            )

    def grow(self, config: ModelConfig) -> Growth:
        """The growth of a model of this config. It keeps its Stacks where the Blocks divide, else it is a single one.

        Raises:
            ValueError: If the source has too few Blocks for the segment, or not the Blocks listed.
        """
        missing = [block for block in self.blocks if block >= config.n_blocks]
        if missing:
            raise ValueError(f"blocks={list(self.blocks)}: the model has no block {missing[0]}, only {config.n_blocks}")
        origins = self._origins(config.n_blocks)
        return grow_blocks(config, origins, n_stacks=_stacks(config, len(origins)), identity=self.identity)

    def shrink(self, target: ModelConfig) -> ModelConfig:
        """The config that grows into `target`. A list of `blocks` comes from a model of as many as it names.

        `grow(shrink(target)).config` has the Blocks of `target`, and its grouping too where both numbers of Blocks
        divide into its Stacks.

        Raises:
            ValueError: If the target has too few Blocks, not as many as are listed, or copies of one Block that differ
                in kind.
        """
        if self.blocks and len(self.blocks) != target.n_blocks:
            raise ValueError(
                f"blocks={list(self.blocks)}: lists {len(self.blocks)} blocks, but the target has {target.n_blocks}"
            )
        if self.extra_layers >= target.n_blocks:
            raise ValueError(
                f"extra_layers={self.extra_layers}: leaves no block of the target's {target.n_blocks} to start from"
            )
        origins = self._origins(target.n_blocks - self.extra_layers)
        return shrink_blocks(target, origins, n_stacks=_stacks(target, max(origins) + 1))

    def _origins(self, n_blocks: int) -> tuple[int, ...]:
        """For each Block of the grown model its source Block, one of `n_blocks`."""
        if self.blocks:
            return self.blocks
        extra, all_blocks = self.extra_layers, tuple(range(n_blocks))
        if self.source == "last":
            return all_blocks + (n_blocks - 1,) * extra
        if self.source == "spread":
            return tuple(block * n_blocks // (n_blocks + extra) for block in range(n_blocks + extra))
        if extra > n_blocks:
            raise ValueError(
                f"extra_layers={extra}: source={self.source} copies a segment of that length, but the model to grow "
                f"is only {n_blocks} deep; use gstack, source=spread or a list of blocks"
            )
        start = n_blocks - extra if self.source == "back" else (n_blocks - extra) // 2
        return all_blocks[: start + extra] + all_blocks[start:]


def _stacks(config: ModelConfig, n_blocks: int) -> int:
    return 1 if n_blocks % config.n_stacks else config.n_stacks
