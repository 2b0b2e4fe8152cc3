"""Which sequences a worker sees. The global batch of a step is the same for any number of workers.

Shapes: B sequences, T tokens.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from raygrow.data.sampler import Sampler
from raygrow.kernels.cross_entropy import IGNORE

Batch = tuple[Tensor, Tensor]


def worker_rows(batch: Batch, *, rank: int, workers: int) -> Batch:
    """This worker's rows of a global batch.

    Every worker gets the same number of rows, since all must take part in each forward pass; where they do not divide
    evenly, the last rows are repeated with nothing to predict.
    """
    tokens_BT, targets_BT = batch
    missing = -len(tokens_BT) % workers
    if missing:
        tokens_BT = torch.cat((tokens_BT, tokens_BT[:1].expand(missing, -1)))
        targets_BT = torch.cat((targets_BT, torch.full_like(targets_BT[:1], IGNORE).expand(missing, -1)))
    return tokens_BT[rank::workers], targets_BT[rank::workers]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copies a batch without waiting, from pinned memory where there is a GPU."""
    if device.type == "cuda":
        batch = batch[0].pin_memory(), batch[1].pin_memory()
    return batch[0].to(device, non_blocking=True), batch[1].to(device, non_blocking=True)


def batches(
    sampler: Sampler, *, first_sample: int, batch_size: int, steps: range, rank: int, workers: int, device: torch.device
) -> Iterator[Batch]:
    """This worker's batch of every step in `steps`, each made ready while the step before it runs."""

    def prepare(step: int) -> Batch:
        batch = sampler.batch(first_sample + step * batch_size, batch_size)
        return to_device(worker_rows(batch, rank=rank, workers=workers), device)

    with ThreadPoolExecutor(max_workers=1) as pool:
        upcoming = pool.submit(prepare, steps.start) if steps else None
        for step in steps:
            assert upcoming is not None
            batch = upcoming.result()
            upcoming = pool.submit(prepare, step + 1) if step + 1 < steps.stop else None
            yield batch
