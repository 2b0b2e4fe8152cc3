"""Triton kernel behind `kernels/cross_entropy.py`. Shapes: N tokens, V vocabulary."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from raygrow.kernels.cross_entropy import IGNORE


@triton.jit
def _kernel(logits, stride, targets, losses, vocab, IGNORED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    target = tl.load(targets + row)
    columns = tl.arange(0, BLOCK)

    # one pass for the running maximum and the sum of exponentials below it (online softmax)
    running_max = -float("inf")
    running_sum = 0.0
    for start in range(0, vocab, BLOCK):
        inside = start + columns < vocab
        x = tl.load(logits + start + columns, mask=inside, other=-float("inf")).to(tl.float32)
        new_max = tl.maximum(running_max, tl.max(x))
        running_sum = running_sum * tl.exp(running_max - new_max) + tl.sum(tl.exp(x - new_max))
        running_max = new_max
    log_sum = running_max + tl.log(running_sum)

    kept = target != IGNORED
    target_logit = tl.load(logits + tl.where(kept, target, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(kept, log_sum - target_logit, 0.0))
    tl.debug_barrier()  # the target's logit is read before any thread overwrites it
    scale = tl.where(kept, 1.0, 0.0)
    for start in range(0, vocab, BLOCK):
        inside = start + columns < vocab
        x = tl.load(logits + start + columns, mask=inside, other=-float("inf")).to(tl.float32)
        gradient = tl.exp(x - log_sum) - tl.where(start + columns == target, 1.0, 0.0)
        tl.store(logits + start + columns, gradient * scale, mask=inside)


def cross_entropy_triton_(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Same contract as `cross_entropy_`: one program a row, two reads and one write of the logits."""
    rows, vocab = logits_NV.shape
    assert logits_NV.stride(-1) == 1, "each row of the logits must be contiguous"
    losses_N = torch.empty(rows, dtype=torch.float32, device=logits_NV.device)
    if rows:
        block = min(triton.next_power_of_2(vocab), 8192)
        _kernel[(rows,)](
            logits_NV, logits_NV.stride(0), targets_N, losses_N, vocab, IGNORED=IGNORE, BLOCK=block, num_warps=16
        )
    return losses_N
