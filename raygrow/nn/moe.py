"""A mixture of experts in the place of a Block's MLP: dropless top-k routing, sorted rows, grouped products.

Nothing here waits for the device, loops over experts or adds atomically: rows are brought to their experts and back by
gathers, in the backward pass too.

Shapes: B batch, T tokens, N = B x T, K experts of a token, S = N x K slots (pairs of a token and one of its experts)
sorted by expert, D model, E experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from raygrow.nn.config import ModelConfig
from raygrow.nn.linear import linear
from raygrow.nn.mlp import Activity, experts, watched


class Balance(NamedTuple):
    """How evenly a router spread the tokens of each sequence."""

    loss_B: Tensor
    """The load-balancing loss (see `balance_loss`), T where all experts share evenly."""
    load_BE: Tensor
    """Slots of each expert."""


class Moe(nn.Module):
    """Each token goes through the `top_k` experts that its router finds likeliest; their outputs are averaged.

    The weights are the softmax over all experts (in fp32 at least), made to sum to 1 over the token's own where
    `norm_topk_prob` (Mixtral's order, arXiv 2401.04088). No expert has a capacity, no token is dropped.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k, self.norm_topk_prob = config.top_k, config.norm_topk_prob
        self.router = linear(config.d_model, config.n_experts)
        self.experts = experts(config)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Balance, Activity | None]:
        """`(B, T, D)` in and out, how evenly the experts were used, and what their hidden units did for each sequence:
        sums over its tokens of means over their experts.
        """
        routes = self.route(x_BTD)
        x_SD = _Dispatch.apply(x_BTD.flatten(0, 1), routes.tokens_S, routes.slots_NK)
        y_SD, activity = watched(self.experts, x_SD, routes.offsets_E)
        y_BTD = routes.combine(y_SD).to(x_BTD.dtype).view_as(x_BTD)
        if activity is None:
            return y_BTD, routes.balance, None
        # a product with each slot's one-hot sequence, not a gather: nothing indexed in the backward pass either
        sequences_B = torch.arange(len(x_BTD), device=x_BTD.device)
        of_sequence_SB = routes.tokens_S[:, None] // x_BTD.shape[1] == sequences_B
        sums = ((of_sequence_SB * part_S[:, None]).sum(0) / self.top_k for part_S in activity)
        return y_BTD, routes.balance, Activity(*sums)

    def route(self, x_BTD: Tensor) -> "Routes":
        """Where each token goes."""
        p_BTE, weights_BTK, experts_BTK = self.choose(x_BTD)
        load_BE = (experts_BTK[..., None] == torch.arange(p_BTE.shape[-1], device=p_BTE.device)).sum((1, 2))

        order_S, slots_NK = sorted_slots(experts_BTK.flatten(0, 1))
        return Routes(
            tokens_S=order_S // self.top_k,
            offsets_E=load_BE.sum(0).cumsum(0, dtype=torch.int32),
            weights_NK=weights_BTK.flatten(0, 1),
            order_S=order_S,
            slots_NK=slots_NK,
            balance=Balance(balance_loss(p_BTE, load_BE), load_BE),
        )

    def choose(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities of all experts `(B, T, E)`, and of each token's own the weights and numbers `(B, T, K)`."""
        logits_BTE = self.router(x_BTD)
        p_BTE = logits_BTE.softmax(-1, dtype=torch.promote_types(logits_BTE.dtype, torch.float32))
        weights_BTK, experts_BTK = p_BTE.topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights_BTK = weights_BTK / weights_BTK.sum(-1, keepdim=True)
        return p_BTE, weights_BTK, experts_BTK


class Routes(NamedTuple):
    """Where the tokens of a batch go, and with which weights they come back."""

    tokens_S: Tensor
    """The token of each slot."""
    offsets_E: Tensor
    """Where the slots of each expert end."""
    weights_NK: Tensor
    order_S: Tensor
    slots_NK: Tensor
    balance: Balance

    def combine(self, y_SD: Tensor) -> Tensor:
        """The weighted sum of each token's slots, `(N, D)` in the weights' precision."""
        return _Combine.apply(y_SD, self.weights_NK, self.order_S, self.slots_NK)


def balance_loss(p_BTE: Tensor, load_BE: Tensor) -> Tensor:
    """Load-balancing loss of Switch (arXiv 2101.03961), of every sequence by itself (DeepSeek-V3, arXiv 2412.19437).

    A sequence has `T x E x sum over e of f_e P_e`, with f the experts' shares of its slots and P their mean
    probabilities. Summed over sequences, it does not depend on how they fall on micro-batches and workers.

    Args:
        p_BTE: Probabilities of the router.
        load_BE: Slots of each expert in each sequence.

    Returns:
        `(B,)` losses, T where all experts share evenly.
    """
    shares_BE = load_BE.to(p_BTE.dtype) / load_BE.sum(-1, keepdim=True)
    return p_BTE.shape[-1] * (shares_BE * p_BTE.sum(1)).sum(-1)


def sorted_slots(experts_NK: Tensor) -> tuple[Tensor, Tensor]:
    """The order that sorts slots by expert, those of one expert by token; and where each token's slots end up.

    Returns:
        `order_S`, the index into the flat `(N, K)` of each sorted slot, and its inverse, shaped `(N, K)`.
    """
    # a radix sort: the narrower the keys, the fewer its passes
    order_S = experts_NK.flatten().to(torch.int16).argsort(stable=True)
    places_S = torch.arange(len(order_S), device=order_S.device)
    return order_S, torch.empty_like(order_S).scatter(0, order_S, places_S).view_as(experts_NK)


# an operator of its own: compiled, an indexed sum is fused with the backward pass of the norm before it, and that
# kernel reads back what it stores without a barrier (pytorch/pytorch#190517): gradients are garbage
@torch.library.custom_op("raygrow::sum_slots", mutates_args=())
def sum_slots(y_SD: Tensor, slots_NK: Tensor) -> Tensor:
    """The sum of each token's slots, `(N, D)`."""
    return y_SD[slots_NK].sum(1)


@sum_slots.register_fake
def _(y_SD: Tensor, slots_NK: Tensor) -> Tensor:
    return y_SD.new_empty(len(slots_NK), y_SD.shape[1])


class _Dispatch(torch.autograd.Function):
    """Brings tokens to their slots. Autograd's own gradient of a gather adds atomically; each token's slots are known,
    so it can be a gather too.
    """

    @staticmethod
    def forward(ctx, x_ND: Tensor, tokens_S: Tensor, slots_NK: Tensor) -> Tensor:
        ctx.save_for_backward(slots_NK)
        return x_ND[tokens_S]

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad_SD,), (slots_NK,) = grads, ctx.saved_tensors
        return sum_slots(grad_SD, slots_NK), None, None


class _Combine(torch.autograd.Function):
    """Brings slots back to their tokens and sums them by their weights; the sum has the weights' precision."""

    @staticmethod
    def forward(ctx, y_SD: Tensor, weights_NK: Tensor, order_S: Tensor, slots_NK: Tensor) -> Tensor:
        ctx.save_for_backward(y_SD, weights_NK, order_S, slots_NK)
        # the caller casts: compiled by torch 2.11, a cast to the same type here would silently end the gradient
        return (y_SD[slots_NK] * weights_NK[..., None]).sum(1)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad_ND,), (y_SD, weights_NK, order_S, slots_NK) = grads, ctx.saved_tensors
        weights_S1 = weights_NK.flatten()[order_S, None]
        grad_y_SD = (grad_ND[order_S // slots_NK.shape[1]] * weights_S1).to(y_SD.dtype)
        grad_weights_NK = (y_SD[slots_NK].to(weights_NK.dtype) * grad_ND[:, None]).sum(-1)
        return grad_y_SD, grad_weights_NK, None, None
