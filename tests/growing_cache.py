"""A key-value cache that only grows: what decoding token by token is, in the fewest words."""

import torch
from torch import Tensor
from torch.nn import functional

from raygrow.kernels.rotary import rotate
from raygrow.nn.attention import Attend, Rope


def growing_attends(n_blocks: int) -> list[Attend]:
    """Attention over all tokens so far, those of the call included. The first call has the prompt, others one token."""
    return [_attend_of() for _ in range(n_blocks)]


def _attend_of() -> Attend:
    cache: list[Tensor] = []

    def attend(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, rope: Rope) -> Tensor:
        first, new = not cache, (rotate(k_BTKH, *rope), v_BTKH)
        cache[:] = new if first else (torch.cat(pair, 1) for pair in zip(cache, new, strict=True))
        heads = (x.transpose(1, 2) for x in (rotate(q_BTNH, *rope), *cache))
        return functional.scaled_dot_product_attention(*heads, is_causal=first, enable_gqa=True).transpose(1, 2)

    return attend
