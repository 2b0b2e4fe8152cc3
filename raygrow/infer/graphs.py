"""CUDA graphs of decoding: one launch for the hundreds of small kernels that a step of a few tokens is.

Shapes: R rows, V vocabulary.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from raygrow.infer.attention import Decodes, cache_attends
from raygrow.infer.kv_cache import KvCache
from raygrow.infer.sampler import likeliest
from raygrow.infer.staging import ROWS, Staging
from raygrow.kernels.grouped_mm import ALIGNMENT
from raygrow.nn.rack import Rack

Outputs = tuple[Tensor, Tensor]
"""Logits `(R, V)` and the likeliest tokens `(R,)`."""


def graph_sizes(largest: int) -> list[int]:
    """Numbers of rows that graphs are made for: few enough to record soon, so many that little is filled up."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, largest, 32)]
    return [size for size in sizes if size < largest] + [largest]


def can_record(model: Rack) -> bool:
    """Whether nothing in the model waits for the device, as grouped products without a kernel do."""
    config, weight = model.config, model.embedding.weight
    aligned = config.d_model % ALIGNMENT == config.d_expert % ALIGNMENT == 0
    return weight.is_cuda and (not config.n_experts or (weight.dtype == torch.bfloat16 and aligned))


class DecodeGraphs:
    """A graph for each of some numbers of rows. Rows without a sequence use the cache's scratch slot.

    Args:
        model: On CUDA.
        cache: For that model.
        largest: Number of rows.
    """

    def __init__(self, model: Rack, cache: KvCache, largest: int) -> None:
        self.largest = largest
        self._model, self._cache, self._sizes = model, cache, graph_sizes(largest)
        device = model.embedding.weight.device
        # token, position and slot of every row; those of a smaller graph lie side by side too, so that one copy does
        self._steps = torch.zeros(ROWS * largest, dtype=torch.int64, device=device)
        self._staging = Staging(largest, device)
        self._graphs: dict[int, tuple[Callable[[], None], Outputs]] = {}
        pool: Any = None
        with torch.inference_mode():
            for size in reversed(self._sizes):  # the largest first: the others fit into its memory
                self._send([[]] * ROWS, size)
                replay, outputs, pool = record(lambda size=size: self._forward(size), pool)
                self._graphs[size] = replay, outputs

    def run(self, numbers: Sequence[Sequence[int]]) -> Outputs:
        """Logits of rows, and their likeliest tokens; they are overwritten by the next call.

        Args:
            numbers: Tokens, positions and slots of the rows.
        """
        rows = len(numbers[0])
        size = self._sizes[bisect_left(self._sizes, rows)]
        self._send(numbers, size)
        replay, (logits_RV, likeliest_R) = self._graphs[size]
        replay()
        return logits_RV[:rows], likeliest_R[:rows]

    def _send(self, numbers: Sequence[Sequence[int]], size: int) -> None:
        self._staging.send(numbers, (0, 0, self._cache.scratch), out=self._step(size))

    def _step(self, size: int) -> Tensor:
        return self._steps[: ROWS * size].view(ROWS, size)

    def _forward(self, size: int) -> Outputs:
        tokens_R, positions_R, slots_R = self._step(size)
        attends = cache_attends(self._model, self._cache, Decodes(slots_R, positions_R), [])
        logits_RV = self._model(tokens_R[None], positions_T=positions_R, attends=attends)[0]
        return logits_RV, likeliest(logits_RV)


def record(compute: Callable[[], Outputs], pool: Any) -> tuple[Callable[[], None], Outputs, Any]:
    """What computes it all again, where its outputs lie, and the memory that other graphs may share."""
    compute()  # compiles kernels and makes workspaces, which a recording must not do
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        outputs = compute()
    return graph.replay, outputs, graph.pool()
