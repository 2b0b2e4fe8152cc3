"""Loss and bits per byte of a model on given tokens.

Bits per byte compares models with different tokenizers; loss per token does not. Shapes: B batch, T tokens.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from raygrow.kernels.cross_entropy import IGNORE
from raygrow.progress import Progress, silent


def bits_per_byte(loss: float, *, bytes_per_token: float) -> float:
    """A loss in nats per token as bits per byte of text."""
    return loss / math.log(2) / bytes_per_token


def in_pieces(
    batch: tuple[Tensor, Tensor], size: int, device: torch.device, progress: Progress = silent
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and targets, `size` sequences at a time, on the device; says so when some have been dealt with."""
    tokens_BT, targets_BT = batch
    for start in range(0, len(tokens_BT), size):
        yield tokens_BT[start : start + size].to(device), targets_BT[start : start + size].to(device)
        progress(min(start + size, len(tokens_BT)), len(tokens_BT), "sequences scored")


@torch.no_grad()
def sum_loss(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, int]:
    """Summed loss in nats (fp64 scalar) and number of targets over batches of `(tokens_BT, targets_BT)`."""
    total, count = None, 0
    for tokens_BT, targets_BT in batches:
        loss = model(tokens_BT, targets_BT).nats.double()
        total = loss if total is None else total + loss
        count += int((targets_BT != IGNORE).sum())
    if total is None:
        raise ValueError("no batch to score")
    return total, count
