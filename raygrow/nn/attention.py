"""Attention with grouped key-value heads. What is attended to comes from outside.

Shapes: B batch, T tokens, D model, N heads, K key-value heads, H head dim.
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from raygrow.kernels.rotary import rotate
from raygrow.nn.config import ModelConfig
from raygrow.nn.linear import linear

Rope = tuple[Tensor, Tensor]
"""Cosines and sines of every position, `(T, H)` each."""
Attend = Callable[[Tensor, Tensor, Tensor, Rope], Tensor]
"""`attend(q_BTNH, k_BTKH, v_BTKH, rope) -> out_BTNH`: turns queries and keys to their positions, and attends: to all of
the sequence in training, to a key-value cache when generating."""


def full_attention(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, rope: Rope, *, causal: bool) -> Tensor:
    """Scaled dot-product attention over all tokens given; `causal` hides the later ones."""
    out = F.scaled_dot_product_attention(
        rotate(q_BTNH, *rope).transpose(1, 2),
        rotate(k_BTKH, *rope).transpose(1, 2),
        v_BTKH.transpose(1, 2),
        is_causal=causal,
        enable_gqa=q_BTNH.shape[2] != k_BTKH.shape[2],
    )
    return out.transpose(1, 2)


def default_attend(config: ModelConfig) -> Attend:
    """Attention over the whole sequence, causal or bidirectional as the model says."""
    return partial(full_attention, causal=config.attention_mode == "causal")


class Attention(nn.Module):
    """Projections and optional QK-norm (per head, as Qwen3) around an `attend` function."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, h, bias = config.d_model, config.head_dim, config.attention_bias
        self.head_dim = h
        self.q = linear(d, config.n_heads * h, bias=bias)
        self.k = linear(d, config.n_kv_heads * h, bias=bias)
        self.v = linear(d, config.n_kv_heads * h, bias=bias)
        self.o = linear(config.n_heads * h, d, bias=bias)
        self.q_norm = nn.RMSNorm(h, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(h, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x_BTD: Tensor, rope: Rope, attend: Attend) -> Tensor:
        q_BTNH = self.q(x_BTD).unflatten(-1, (-1, self.head_dim))
        k_BTKH = self.k(x_BTD).unflatten(-1, (-1, self.head_dim))
        v_BTKH = self.v(x_BTD).unflatten(-1, (-1, self.head_dim))
        return self.o(attend(self.q_norm(q_BTNH), self.k_norm(k_BTKH), v_BTKH, rope).flatten(2))
