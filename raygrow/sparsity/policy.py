"""Which tokens are sparse, and the loss of a model on them.

    all       every token
    decode    the first half of each sequence is a prompt and dense, keys and values included; each token of the second
              half is sparse and attends to the prompt's dense keys and values and to the sparse ones before its own.
              The targets of the second half alone count.

A causal model computes `decode` in one forward pass: what a prompt's tokens are does not depend on those behind.
Shapes: B sequences, T tokens, N tokens of all sequences, D model, V vocabulary.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from raygrow.kernels.cross_entropy import IGNORE
from raygrow.nn.rack import Rack
from raygrow.nn.score import in_pieces, sum_loss
from raygrow.sparsity.linear import SparseRows

Policy = Literal["all", "decode"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
CHUNK = 1024
"""Tokens whose logits are there at a time."""


def policy_loss(
    model: Rack, rows: SparseRows, batch: tuple[Tensor, Tensor], policy: Policy, *, batch_size: int = 8
) -> float:
    """Nats per token of a model under a policy.

    Args:
        model: Sparse, or dense: then the policy only says which targets count.
        rows: What tells the model which tokens are sparse.
        batch: Tokens and targets, `(B, T)` each.
        policy: Which tokens are sparse.
        batch_size: Sequences at a time.
    """
    counted = under_policy(batch, rows, policy)
    with torch.inference_mode():
        total, count = sum_loss(model, in_pieces(counted, batch_size, model.embedding.weight.device))
    return total.item() / count


def under_policy(batch: tuple[Tensor, Tensor], rows: SparseRows, policy: Policy) -> tuple[Tensor, Tensor]:
    """Tells a model which tokens are sparse; the batch with those targets alone that count."""
    tokens_BT, targets_BT = batch
    rows.start, rows.stop = (0 if policy == "all" else tokens_BT.shape[1] // 2), None
    counted_BT = targets_BT.clone()
    counted_BT[:, : rows.start] = IGNORE
    return tokens_BT, counted_BT


class Divergence:
    """How far a model is from what it said before it was made sparse: nats per token, every token sparse.

    The Kullback-Leibler divergence of its predictions from the dense model's. It is what the loss rises by if the dense
    model's predictions are the truth, never negative, and far less noisy than the loss of a short text.

    Args:
        model: While it is dense.
        tokens_BT: The text.
        batch_size: Sequences at a time.
    """

    def __init__(self, model: Rack, tokens_BT: Tensor, *, batch_size: int = 8) -> None:
        self._model, self._batches = model, tokens_BT.split(batch_size)
        self._device = model.embedding.weight.device
        self.tokens = tokens_BT.numel()
        # logits rounded to bf16 differ by more than a little sparsity does
        head_VD = model.head_weight.detach()
        self._head_VD = head_VD.to(torch.promote_types(head_VD.dtype, torch.float32))
        self._dense_ND = [hidden(model, tokens) for tokens in self._batches]

    @torch.inference_mode()
    def measure(self) -> float:
        """Nats per token of the model as it now is."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for tokens_BT, dense_ND in zip(self._batches, self._dense_ND, strict=True):
            sparse_ND = hidden(self._model, tokens_BT)
            for dense, sparse in zip(dense_ND.split(CHUNK), sparse_ND.split(CHUNK), strict=True):
                expected, found = self._log_probabilities(dense), self._log_probabilities(sparse)
                total += F.kl_div(found, expected, reduction="sum", log_target=True).double()
        return total.item() / self.tokens

    def _log_probabilities(self, x_ND: Tensor) -> Tensor:
        wide_ND = x_ND.to(self._head_VD.dtype) * self._model.config.logit_scale
        return F.linear(wide_ND, self._head_VD).log_softmax(-1)


@torch.inference_mode()
def hidden(model: Rack, tokens_BT: Tensor) -> Tensor:
    """What the head reads, `(N, D)`, without the logits that it would make of all of it."""
    device, found = model.embedding.weight.device, []
    hook = model.blocks[-1].register_forward_hook(lambda module, inputs, output: found.append(output[0]))
    model(tokens_BT.to(device), rows=torch.zeros(1, dtype=torch.int64, device=device))
    hook.remove()
    return model.norm(found[0].flatten(0, 1))
