"""One optimizer step: micro-batches forward and backward, clipping, AdamW.

Shapes: B sequences, T tokens, L Blocks with experts, E experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from raygrow.nn.loss import Loss, add_losses
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
    load_balancing: float,
    activation_l1: float,
) -> tuple[Loss, Tensor]:
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
        load_balancing: Weight of the load-balancing loss of a model with experts.
        activation_l1: Weight of the hidden units' mean absolute value.

    Returns:
        The sums of the losses of this worker's tokens, and the gradient norm before clipping; on the device, not yet
        waited for.
    """
    micro_batches = list(zip(*(part.split(micro_batch_size) for part in batch), strict=True))
    losses = []
    assert isinstance(model, FSDPModule)
    for index, (tokens_BT, targets_BT) in enumerate(micro_batches):
        model.set_requires_gradient_sync(index == len(micro_batches) - 1)
        loss = model(tokens_BT, targets_BT)
        # FSDP averages gradients over workers; the sum is wanted
        (loss.objective(load_balancing, activation_l1) / step_tokens * workers).backward()
        losses.append(loss.detach())
    norm = torch.nn.utils.clip_grad_norm_((p for p in model.parameters() if p.requires_grad), clip)
    optimizer.step()
    optimizer.zero_grad()
    return add_losses(losses), norm.full_tensor() if isinstance(norm, DTensor) else norm


def loss_of_sums(like: Loss, sums: Sequence[float]) -> Loss:
    """A Loss like another one from its elements in a row, as the workers have summed them."""
    left = iter(sums)
    return Loss._make(
        None
        if part is None
        else torch.tensor([next(left) for _ in range(part.numel())], dtype=torch.float64).view_as(part)
        for part in like
    )


def figures(loss: Loss, *, tokens: int) -> dict[str, float]:
    """The metrics of what some models have, experts or hidden units at zero, by name; means over tokens."""
    found: dict[str, float] = {}
    if loss.balance is not None and loss.load_LE is not None:
        found |= expert_figures(loss.balance.item(), loss.load_LE, tokens=tokens)
    if loss.activation is not None and loss.active is not None:
        found |= {"activation_l1": loss.activation.item() / tokens, "active_share": loss.active.item() / tokens}
    return found


def expert_figures(balance: float, load_LE: Tensor, *, tokens: int) -> dict[str, float]:
    """The metrics of experts, by name.

    Args:
        balance: Sum of the load-balancing losses of the Blocks with experts.
        load_LE: Slots that each expert got.
        tokens: Tokens that were trained on.

    Returns:
        The loss a token and Block, 1 where all experts share evenly; the largest and smallest load of any expert,
        as a multiple of an even one.
    """
    relative_LE = load_LE / load_LE.mean(-1, keepdim=True)
    return {
        "balance_loss": balance / len(load_LE) / tokens,
        "expert_load_max": relative_LE.max().item(),
        "expert_load_min": relative_LE.min().item(),
    }
