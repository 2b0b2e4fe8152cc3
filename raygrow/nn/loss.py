"""Language-model loss that never holds all logits.

Shapes: N tokens, D model, V vocabulary, L Blocks with experts, E experts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from raygrow.kernels.cross_entropy import cross_entropy_

LOGIT_BYTES = 512 * 2**20
"""Size of the chunk of logits that is alive at a time."""

ALIGNMENT = 64
"""The vocabulary is padded to a multiple of this: rows of 50257 logits do not start where CUDA's fast kernels can load
from."""


class Loss(NamedTuple):
    """What a model makes of tokens and their targets. Sums over tokens: divide by their number for means."""

    nats: Tensor
    """Cross entropy, a scalar in fp32 at least."""
    balance: Tensor | None = None
    """Load-balancing loss of all Blocks with experts together, a scalar; None for a dense model."""
    load_LE: Tensor | None = None
    """Slots that each expert got; None for a dense model."""
    activation: Tensor | None = None
    """Mean absolute value of a hidden unit (mean over units and Blocks), a scalar; None where units are not exactly
    zero, or no gradient is wanted."""
    active: Tensor | None = None
    """Share of hidden units that are not zero, likewise."""

    def detach(self) -> "Loss":
        """The same values without their gradients."""
        return Loss._make(None if part is None else part.detach() for part in self)

    def objective(self, load_balancing: float, activation_l1: float = 0.0) -> Tensor:
        """What training minimises: the cross entropy and, so weighted, the Blocks' mean load-balancing loss and the
        hidden units' mean absolute value.
        """
        total = self.nats
        if self.balance is not None and self.load_LE is not None:
            total = total + load_balancing / len(self.load_LE) * self.balance
        if self.activation is not None and activation_l1:
            total = total + activation_l1 * self.activation
        return total


def add_losses(losses: Sequence[Loss]) -> Loss:
    """The Loss of all their tokens together."""
    return Loss._make(None if parts[0] is None else torch.stack(parts).sum(0) for parts in zip(*losses, strict=True))


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, chunk by chunk, while the chunk's logits exist.

    The head's three matrix products are done once each, as with full logits; recomputing would add a fourth.
    """

    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.promote_types(x_ND.dtype, torch.float32), device=x_ND.device)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        grad_x_ND = torch.empty_like(x_ND) if needs_x else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=total.dtype) if needs_weight else None
        vocab_size = len(weight_VD)
        if vocab_size % ALIGNMENT:
            weight_VD = F.pad(weight_VD, (0, 0, 0, -vocab_size % ALIGNMENT))
        rows = max(1, LOGIT_BYTES // (len(weight_VD) * x_ND.element_size()))
        for start in range(0, len(x_ND), rows):
            chunk = slice(start, start + rows)
            logits_NV = x_ND[chunk] @ weight_VD.T
            logits_NV[:, vocab_size:] = -torch.inf  # padding has no probability, hence no gradient
            total += cross_entropy_(logits_NV, targets_N[chunk]).sum()
            if grad_x_ND is not None:
                torch.mm(logits_NV, weight_VD, out=grad_x_ND[chunk])
            if grad_weight_VD is not None:
                grad_weight_VD += (logits_NV.T @ x_ND[chunk])[:vocab_size]
        ctx.save_for_backward(grad_x_ND, grad_weight_VD)
        ctx.dtypes = x_ND.dtype, weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad_total,) = grads
        grad_x_ND, grad_weight_VD = (
            None if grad is None else (grad * grad_total).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return grad_x_ND, grad_weight_VD, None


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Sum over tokens of the cross entropy of `x_ND @ weight_VD.T` with the targets, in nats.

    Args:
        x_ND: Final hidden states.
        weight_VD: Output matrix.
        targets_N: Token ids; -100 is left out.

    Returns:
        A scalar, fp32 (fp64 for fp64 input). Divide by the number of targets for a mean.
    """
    if not torch.is_grad_enabled():  # spare the gradients that nobody will ask for
        x_ND, weight_VD = x_ND.detach(), weight_VD.detach()
    return _LinearCrossEntropy.apply(x_ND, weight_VD, targets_N)
