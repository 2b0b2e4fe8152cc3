"""Attention of one step over the key-value cache: decoding rows all at once, each stretch of a prompt by itself.

Shapes: B batch (always 1), T tokens of the step, R decoding rows, C tokens of a stretch, S cached tokens of one slot,
N heads, K key-value heads, H head dim.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.bias import causal_lower_right

from raygrow.infer.kv_cache import KvCache
from raygrow.kernels.decode_attention import decode_attention
from raygrow.kernels.group_select import GROUP
from raygrow.kernels.rotary import rotate_fused
from raygrow.nn.attention import Attend, Rope
from raygrow.nn.rack import Rack
from raygrow.sparsity.linear import SparseLinear

KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""For stretches of prompts. Not cuDNN's, which torch prefers on an H200: each new length would have it build a plan."""


@dataclass(frozen=True)
class Decodes:
    """The leading tokens of a step, each the only one of its sequence."""

    slots_R: Tensor
    positions_R: Tensor


@dataclass(frozen=True)
class Stretch:
    """Further tokens of a step that follow each other in one sequence."""

    slot: int
    rows: slice
    """Where they are among the tokens of the step."""
    start: int
    stop: int
    """Their positions in the sequence."""
    mask: Tensor | None
    """Which of the sequence's tokens each one sees; None where they begin it."""


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """What the last tokens of a sequence see: themselves and all before."""
    if device.type == "cuda":
        return causal_lower_right(queries, keys)  # the kernels know this one without a tensor
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril_(keys - queries)


def cache_attends(model: Rack, cache: KvCache, decodes: Decodes | None, stretches: list[Stretch]) -> list[Attend]:
    """One attention function per Block: stores the step's keys and values, and attends to all of each sequence."""
    alone = decodes is not None and len(decodes.slots_R) == 1 and not stretches
    return [
        partial(_attend, k_cache, v_cache, decodes, stretches, _listing_reader(block) if alone else None)
        for block, k_cache, v_cache in zip(model.blocks, cache.k, cache.v, strict=True)
    ]


def _listing_reader(block: Any) -> SparseLinear | None:
    """What reads a Block's attention, if it wants what it keeps of a token alone listed, and heads are whole groups."""
    o, whole = block.attention.o, block.attention.head_dim % GROUP == 0
    return o if whole and isinstance(o, SparseLinear) and o.groups else None


def _attend(
    k_cache: Tensor,
    v_cache: Tensor,
    decodes: Decodes | None,
    stretches: list[Stretch],
    reader: SparseLinear | None,
    q_BTNH: Tensor,
    k_BTKH: Tensor,
    v_BTKH: Tensor,
    rope: Rope,
) -> Tensor:
    q_TNH, k_TKH, v_TKH = q_BTNH[0], k_BTKH[0], v_BTKH[0]
    parts, first = [], 0
    if decodes is not None:
        first = len(decodes.slots_R)
        new = q_TNH[:first], k_TKH[:first], v_TKH[:first], (rope[0][:first], rope[1][:first])
        given = *new, k_cache, v_cache, decodes.slots_R, decodes.positions_R
        out_RNH, listed = decode_attention(*given, reader.groups if reader else None)
        if reader and listed:
            reader.tell(out_RNH, listed)
        parts.append(out_RNH)
    if stretches:  # all are turned at once
        angles = rope[0][first:], rope[1][first:]
        q_CNH, k_CKH = rotate_fused(q_TNH[first:], *angles), rotate_fused(k_TKH[first:], *angles)
    for stretch in stretches:
        rows = slice(stretch.rows.start - first, stretch.rows.stop - first)
        k_SKH, v_SKH = k_cache[stretch.slot, : stretch.stop], v_cache[stretch.slot, : stretch.stop]
        k_SKH[stretch.start :] = k_CKH[rows]
        v_SKH[stretch.start :] = v_TKH[stretch.rows]
        parts.append(_stretch_attention(q_CNH[rows], k_SKH, v_SKH, stretch.mask))
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]


def _stretch_attention(q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, mask: Tensor | None) -> Tensor:
    groups = q_TNH.shape[1] // k_SKH.shape[1]
    k_NSH, v_NSH = (x.transpose(0, 1) for x in (k_SKH, v_SKH))
    if groups > 1:  # not `enable_gqa`: the kernels that know the mask without a tensor do not all take it
        k_NSH, v_NSH = k_NSH.repeat_interleave(groups, 0), v_NSH.repeat_interleave(groups, 0)
    out_NTH = F.scaled_dot_product_attention(
        q_TNH.transpose(0, 1)[None], k_NSH[None], v_NSH[None], attn_mask=mask, is_causal=mask is None
    )[0]
    return out_NTH.transpose(0, 1)
