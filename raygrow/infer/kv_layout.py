"""Where the tokens and pages of a key-value cache lie in its virtual tensors.

Shapes: S rows, one for every slot and one more, T tokens, K key-value heads, H head dim.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from raygrow.nn.config import ModelConfig

Layout = Literal["block", "interleaved"]
"""Where a token's keys and values lie, which are always side by side: those of each Block in a tensor of its own, or
those of all Blocks in one tensor.

A page of the first holds many tokens of one Block, which is fast to read; a page of the second few tokens of all
Blocks, which wastes less memory on the last, half-empty page of a sequence."""


class KvLayout:
    """Tensors that are all alike, one behind the other, each with a row for every slot, each row of whole pages.

    Args:
        config: The model.
        rows: Of a tensor.
        max_tokens: Of a row.
        dtype: Of keys and values.
        layout: See `Layout`.
        page_bytes: Smallest piece of memory.
    """

    def __init__(
        self, config: ModelConfig, *, rows: int, max_tokens: int, dtype: torch.dtype, layout: Layout, page_bytes: int
    ) -> None:
        self.interleaved = layout == "interleaved"
        self.tensors = 1 if self.interleaved else config.n_blocks
        self.shape = rows, max_tokens, config.n_kv_heads, config.head_dim
        self.blocks, self.page_bytes = config.n_blocks, page_bytes
        self.token_bytes = 2 * config.n_kv_heads * config.head_dim * dtype.itemsize * config.n_blocks // self.tensors
        """Of a token in one tensor."""
        self.row_bytes = -(-max_tokens * self.token_bytes // page_bytes) * page_bytes
        self.strip_bytes = self.tensors * page_bytes
        """Of a page of one slot in every tensor."""
        self.nbytes = self.tensors * rows * self.row_bytes

    def pages(self, tokens: int) -> int:
        """How many a row's first tokens reach, in each tensor."""
        return -(-tokens * self.token_bytes // self.page_bytes)

    def tokens(self, pages: int) -> int:
        """How many the first pages of a row hold."""
        return pages * self.page_bytes // self.token_bytes

    def offsets(self, row: int, page: int) -> Iterator[int]:
        """Where a page of a row begins, in every tensor: bytes from the first one's beginning."""
        for tensor in range(self.tensors):
            yield (tensor * self.shape[0] + row) * self.row_bytes + page * self.page_bytes

    def views(self, flat: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of every Block, `(S, T, K, H)` each, in memory of `nbytes`."""
        rows, _, heads, head_dim = self.shape
        size, row = heads * head_dim, self.row_bytes // flat.itemsize
        stride = row, 2 * size * (self.blocks if self.interleaved else 1), head_dim, 1

        def view(block: int, part: int) -> Tensor:
            start = 2 * block * size if self.interleaved else block * rows * row
            return flat.as_strided(self.shape, stride, start + part * size)

        return [view(block, 0) for block in range(self.blocks)], [view(block, 1) for block in range(self.blocks)]
