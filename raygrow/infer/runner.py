"""Runs the model on the chunks of one step.

Shapes: T tokens of the step, R decoding rows, L rows whose logits are wanted, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from raygrow.infer.attention import KERNELS, Decodes, Stretch, cache_attends, causal_mask
from raygrow.infer.graphs import DecodeGraphs
from raygrow.infer.kv_cache import KvCache
from raygrow.infer.scheduler import Chunk
from raygrow.infer.staging import Staging, to_device
from raygrow.nn.rack import Rack
from raygrow.sparsity.linear import SparseRows


class Computed(NamedTuple):
    """What the model says; the device may still be at it. It is overwritten by the next step."""

    logits_LV: Tensor
    likeliest_L: Tensor | None
    """The tokens chosen greedily, where they are known."""


class Runner:
    """A model and its key-value cache.

    Args:
        model: In the dtype and on the device that it runs in.
        cache: For that model.
        largest: Tokens of a step, at most.
        graphs: The largest number of sequences whose decoding is recorded as a CUDA graph; 0 for none.
        rows: What tells a sparse model which tokens of a step are; None for a dense one.
    """

    def __init__(
        self, model: Rack, cache: KvCache, *, largest: int, graphs: int = 0, rows: SparseRows | None = None
    ) -> None:
        self._model, self._cache, self._rows = model, cache, rows
        self._device = model.embedding.weight.device
        self._staging = Staging(largest, self._device)
        if rows is not None:  # graphs are for steps of answers alone
            rows.start, rows.stop = 0, None
        self._graphs = DecodeGraphs(model, cache, graphs) if graphs else None

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> Computed:
        """Computes chunks, which are in the order of their places, and stores their keys and values.

        Returns:
            For the positions that the chunks want, in their order.
        """
        numbers = _numbers(chunks)
        decoding = sum(chunk.single for chunk in chunks)
        if self._graphs is not None and decoding == len(chunks) <= self._graphs.largest and self._all_sparse(chunks):
            logits_RV, likeliest_R = self._graphs.run(numbers)
            if all(chunk.wanted for chunk in chunks):
                return Computed(logits_RV, likeliest_R)
            return Computed(logits_RV[self._wanted(chunks)], None)
        tokens_T, positions_T, slots_T = self._staging.send(numbers)
        self._tell_rows(chunks)
        decodes = None
        if decoding:
            rows = slice(0, decoding)
            decodes = Decodes(slots_T[rows], positions_T[rows])
        attends = cache_attends(self._model, self._cache, decodes, self._stretches(chunks[decoding:], decoding))
        with sdpa_kernel(KERNELS):
            logits_BLV = self._model(
                tokens_T[None], positions_T=positions_T, attends=attends, rows=self._wanted(chunks)
            )
        return Computed(logits_BLV[0], None)

    def _all_sparse(self, chunks: list[Chunk]) -> bool:
        """Whether all tokens of a sparse model's step are; of a dense model it makes no difference."""
        return self._rows is None or chunks[0].sparse

    def _tell_rows(self, chunks: list[Chunk]) -> None:
        """Tells a sparse model which tokens of the step are sparse."""
        if self._rows is not None:
            self._rows.start = sum(chunk.place == 0 for chunk in chunks)
            self._rows.stop = self._rows.start + sum(chunk.stop - chunk.start for chunk in chunks if chunk.sparse)

    def _stretches(self, chunks: list[Chunk], row: int) -> list[Stretch]:
        stretches = []
        for chunk in chunks:
            slot, length = chunk.sequence.slot, chunk.stop - chunk.start
            assert slot is not None
            mask = causal_mask(length, chunk.stop, self._device) if chunk.start else None
            stretches.append(Stretch(slot, slice(row, row + length), chunk.start, chunk.stop, mask))
            row += length
        return stretches

    def _wanted(self, chunks: list[Chunk]) -> Tensor:
        """Indices of the tokens of the step whose logits are wanted."""
        rows, first = [], 0
        for chunk in chunks:
            rows += [first + position - chunk.start for position in chunk.wanted]
            first += chunk.stop - chunk.start
        return to_device(rows, self._device)


def _numbers(chunks: list[Chunk]) -> list[list]:
    """Token, position and slot of every token of the step."""
    if chunks[-1].stop - chunks[-1].start == 1:  # then all are, which is most steps
        return [
            [sequence.tokens[start] for sequence, start, _ in chunks],
            [start for _, start, _ in chunks],
            [sequence.slot for sequence, _, _ in chunks],
        ]
    return [
        [token for sequence, start, stop in chunks for token in sequence.tokens[start:stop]],
        [position for _, start, stop in chunks for position in range(start, stop)],
        [sequence.slot for sequence, start, stop in chunks for _ in range(start, stop)],
    ]
