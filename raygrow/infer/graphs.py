"""CUDA graphs of decoding: one launch for the hundreds of small kernels that a step of a few tokens is.

Shapes: R rows, V vocabulary.
"""

import torch
from torch import Tensor

from raygrow.infer.attention import Decodes, cache_attends
from raygrow.infer.kv_cache import KvCache
from raygrow.kernels.grouped_mm import ALIGNMENT
from raygrow.nn.rack import Rack


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
        self._model, self._cache = model, cache
        # token, position and slot of every row
        self._step_3R = torch.zeros(3, largest, dtype=torch.int64, device=model.embedding.weight.device)
        self._step_3R[2] = cache.scratch
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        with torch.inference_mode():
            for size in reversed(graph_sizes(largest)):  # the largest first: the others fit into its memory
                self._record(size)

    def run(self, step_3R: Tensor) -> Tensor:
        """Logits `(R, V)` of rows; they are overwritten by the next call.

        Args:
            step_3R: Token, position and slot of each row.
        """
        rows = step_3R.shape[1]
        size = min(size for size in self._graphs if size >= rows)
        self._step_3R[:, :rows] = step_3R
        self._step_3R[:2, rows:size] = 0
        self._step_3R[2, rows:size] = self._cache.scratch
        graph, logits_RV = self._graphs[size]
        graph.replay()
        return logits_RV[:rows]

    def _record(self, size: int) -> None:
        self._forward(size)  # compiles kernels and makes workspaces, which a recording must not do
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits_RV = self._forward(size)
        self._graphs[size] = graph, logits_RV

    def _forward(self, size: int) -> Tensor:
        tokens_R, positions_R, slots_R = self._step_3R[:, :size]
        attends = cache_attends(self._cache, Decodes(slots_R, positions_R, positions_R + 1), [])
        return self._model(tokens_R[None], positions_T=positions_R, attends=attends)[0]
