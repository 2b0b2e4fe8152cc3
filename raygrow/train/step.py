"""One optimizer step: micro-batches forward and backward, clipping, AdamW. Shapes: B sequences, T tokens."""

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from raygrow.nn.rack import Rack


def train_step(
    model: Rack,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    *,
    micro_batch_size: int,
    step_tokens: int,
    workers: int,
    clip: float,
) -> tuple[Tensor, Tensor]:
    """Trains on this worker's part of a global batch.

    The loss is divided by the tokens of the whole step, so that the gradient is the same for any number of workers
    and micro-batches (up to the order of sums).

    Args:
        model: The sharded model.
        optimizer: Its optimizer.
        batch: This worker's `(tokens_BT, targets_BT)`.
        micro_batch_size: Sequences per forward pass.
        step_tokens: Tokens of the global batch.
        workers: Number of workers.
        clip: Largest gradient norm.

    Returns:
        This worker's share of the mean loss (the workers' shares add up to it), and the gradient norm before
        clipping; scalars on the device, not yet waited for.
    """
    micro_batches = list(zip(*(part.split(micro_batch_size) for part in batch), strict=True))
    share = torch.zeros((), device=batch[0].device)
    assert isinstance(model, FSDPModule)
    for index, (tokens_BT, targets_BT) in enumerate(micro_batches):
        model.set_requires_gradient_sync(index == len(micro_batches) - 1)
        loss = model(tokens_BT, targets_BT).nats / step_tokens
        # FSDP averages gradients over workers; the sum is wanted
        (loss * workers).backward()
        share += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_((p for p in model.parameters() if p.requires_grad), clip)
    optimizer.step()
    optimizer.zero_grad()
    return share, norm.full_tensor() if isinstance(norm, DTensor) else norm
