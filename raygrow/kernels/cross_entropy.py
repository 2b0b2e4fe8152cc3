"""Cross entropy that overwrites the logits with their gradient, so that no second copy of them is ever made.

`cross_entropy_` picks the Triton kernel on CUDA and its torch twin elsewhere. Shapes: N tokens, V vocabulary.
"""

import torch
from torch import Tensor

IGNORE = -100
"""Target id of a token that has no loss."""


def cross_entropy_(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Loss of every token; `logits_NV` is overwritten with d(sum of losses)/d(logits).

    Args:
        logits_NV: Logits, any float dtype, contiguous. Overwritten.
        targets_N: Token ids, `IGNORE` for none.

    Returns:
        `(N,)` losses in nats, fp32 (fp64 for fp64 logits); 0 where the target is `IGNORE`.
    """
    if logits_NV.is_cuda:
        from raygrow.kernels.triton_cross_entropy import cross_entropy_triton_

        return cross_entropy_triton_(logits_NV, targets_N)
    return cross_entropy_torch_(logits_NV, targets_N)


def cross_entropy_torch_(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """The torch twin of the Triton kernel; same contract as `cross_entropy_`."""
    wide = logits_NV.float() if logits_NV.dtype in (torch.bfloat16, torch.float16) else logits_NV
    kept = targets_N != IGNORE
    rows, targets = torch.arange(len(targets_N), device=targets_N.device), targets_N.clamp(min=0)
    log_sum_N = wide.logsumexp(dim=-1)
    losses_N = torch.where(kept, log_sum_N - wide[rows, targets], 0.0)
    probabilities_NV = wide.sub_(log_sum_N[:, None]).exp_()
    probabilities_NV[rows, targets] -= 1.0
    probabilities_NV *= kept[:, None]
    if probabilities_NV is not logits_NV:
        logits_NV.copy_(probabilities_NV)
    return losses_N
