"""Growth that only repeats, reorders or drops whole Blocks: what Gstack and depth growth share."""

import re
from collections.abc import Sequence
from dataclasses import replace

from raygrow.growth.growth import Growth, refuse_adapters
from raygrow.nn.config import ModelConfig
from raygrow.weights.rules import Rule, Term
from raygrow.weights.shapes import parameter_shapes

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def split_name(name: str) -> tuple[int | None, str]:
    """The Block that a parameter is in and its name there; no Block for the embedding, the last norm and the head."""
    match = _BLOCK.fullmatch(name)
    return (int(match[1]), match[2]) if match else (None, name)


def grow_blocks(config: ModelConfig, origins: Sequence[int], *, n_stacks: int, identity: bool = False) -> Growth:
    """The growth whose Block i is Block `origins[i]` of the source; everything else is copied.

    Args:
        config: Of the source.
        origins: For each Block of the grown model, one of the source.
        n_stacks: Stacks of the grown model.
        identity: Whether a Block of the source that comes up again adds nothing to the residual stream there.
    """
    refuse_adapters(config)
    target = replace(
        config,
        n_stacks=n_stacks,
        blocks_per_stack=len(origins) // n_stacks,
        dense_blocks=tuple(block for block, origin in enumerate(origins) if origin in config.dense_blocks),
    )
    firsts = [block for block, origin in enumerate(origins) if origin not in origins[:block]]
    rules = {}
    for name in parameter_shapes(target):
        block, rest = split_name(name)
        if block is None:
            rules[name] = Rule((Term(name),))
        else:
            silent = identity and block not in firsts
            rules[name] = Rule((_term(f"blocks.{origins[block]}.{rest}", silent=silent),))
    in_order = [origins[block] for block in firsts] == list(range(config.n_blocks))
    exact = in_order and (identity or len(firsts) == len(origins))
    return Growth(config=target, rules=rules, exact=exact, origins=tuple(origins))


def shrink_blocks(target: ModelConfig, origins: Sequence[int], *, n_stacks: int) -> ModelConfig:
    """The config of a source that `grow_blocks` makes into `target`: its Blocks are 0 to `max(origins)`.

    Raises:
        ValueError: If a dense and a mixture-of-experts Block would have to come from the same Block.
    """
    dense = {origins[block] for block in target.dense_blocks}
    for block, origin in enumerate(origins):
        if origin in dense and target.has_experts(block):
            twins = [other for other, its_origin in enumerate(origins) if its_origin == origin]
            raise ValueError(
                f"dense_blocks={list(target.dense_blocks)}: blocks {twins} are grown from the same block of the "
                "smaller model, so all or none of them can be dense"
            )
    blocks_per_stack = (max(origins) + 1) // n_stacks
    return replace(target, n_stacks=n_stacks, blocks_per_stack=blocks_per_stack, dense_blocks=tuple(sorted(dense)))


def _term(source: str, *, silent: bool) -> Term:
    if not silent:
        return Term(source)
    # o and down write to the residual stream; at zero they let no gradient through to the rest of the Block, and their
    # own is not that of the source's Block: Adam knows nothing about either
    writes = source.split(".")[-2] in ("o", "down")
    return Term(source, coefficient=0.0 if writes else 1.0, gradient=0.0)
