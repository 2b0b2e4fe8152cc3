"""Triton kernel behind `kernels/decode_attention.py`: split-KV flash decoding, with the new token's rotation and store.

One program reads one part of one row's keys and values of one key-value head, for all the heads that share it. The last
program of a row and head to end puts the parts together, in their order. How a row is split depends on its length and
on how many rows there are, not on what the others hold; parts that a row does not have return at once. What is put
together is whole groups of entries, of which what is kept is listed if the next product asks for it.

Shapes: R rows, S slots, T tokens, N heads, K key-value heads, G heads that share one, H head dim, P parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from raygrow.kernels.group_select import GROUP, Groups, Listed
from raygrow.kernels.triton_group_select import empty_list, list_largest
from raygrow.kernels.triton_launch import overlapping, overlaps, tickets_of

PROGRAMS = 1024
"""So many keep a GPU busy: few rows are split into more parts than many."""
MOST_PARTS = 128
"""Of a row: the program that puts them together holds all of them."""
SMALLEST_PART = 64
"""Tokens; a smaller part is not worth a program."""
STAGES = 3
"""Pieces of keys and values that are on their way at a time."""
WARPS = 4


@triton.jit
def _rotated(x, where, cos_h, sin_h, h, mask, H: tl.constexpr):
    """Vectors of heads turned by a position's angles, rounded to their type as when they are stored."""
    x_h = tl.load(x + where + h, mask=mask, other=0.0).to(tl.float32)
    half: tl.constexpr = H // 2
    other_h = tl.load(x + where + (h + half) % H, mask=mask, other=0.0).to(tl.float32)
    turned_h = tl.where(h < half, -other_h, other_h)
    return (x_h * cos_h + turned_h * sin_h).to(x.dtype.element_ty)


@triton.jit
def _fold(score_gt, v_th, highest_g, sum_g, out_gh):
    """Tokens more in a running softmax."""
    new_highest_g = tl.maximum(highest_g, tl.max(score_gt, 1))
    weight_gt = tl.exp(score_gt - new_highest_g[:, None])
    shrink_g = tl.exp(highest_g - new_highest_g)
    product_gh = tl.dot(weight_gt.to(v_th.dtype), v_th, input_precision="ieee")
    return new_highest_g, sum_g * shrink_g + tl.sum(weight_gt, 1), out_gh * shrink_g[:, None] + product_gh


@triton.jit
def _attend(
    q, k_new, v_new, cos, sin, k, v, slots, positions, out, partial, tickets,
    q_stride, k_stride, v_stride, slot_stride, token_stride, scale,
    keep, kept_before, kept_scale, kept_index, kept_value, kept_squares,
    K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, PARTS: tl.constexpr, SMALLEST: tl.constexpr,
    ALIGNED: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, PDL: tl.constexpr,
    THEN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    # addresses, not tensors: a launch would look at the first byte of a tensor, whose page may not exist. Of addresses
    # the compiler knows nothing, and would read entry by entry
    k = tl.multiple_of(k.to(tl.pointer_type(q.dtype.element_ty)), ALIGNED)
    v = tl.multiple_of(v.to(tl.pointer_type(q.dtype.element_ty)), ALIGNED)
    kv_head, row, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    position = tl.load(positions + row).to(tl.int32)
    slot = tl.load(slots + row).to(tl.int64)  # before it is needed: what is read next need not wait for it then
    size = tl.maximum(tl.cdiv(tl.cdiv(position + 1, PARTS), BLOCK_T) * BLOCK_T, SMALLEST)
    first = part * size
    if first > position:
        return
    parts = tl.cdiv(position + 1, size)

    g, h, t = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_T)
    real_h = h < H
    real_gh = (g < G)[:, None] & real_h[None, :]
    cos_h, sin_h = tl.load(cos + row * H + h, mask=real_h), tl.load(sin + row * H + h, mask=real_h)
    head_g = kv_head * G + g
    q_gh = _rotated(q + row * q_stride, head_g[:, None] * H, cos_h[None, :], sin_h[None, :], h[None, :], real_gh, H)
    base = slot * slot_stride + kv_head * H

    highest_g = tl.full([BLOCK_G], -float("inf"), tl.float32)
    sum_g = tl.zeros([BLOCK_G], tl.float32)
    out_gh = tl.zeros([BLOCK_G, BLOCK_H], tl.float32)
    last = tl.minimum(first + size, position)
    for start in tl.range(first, last, BLOCK_T, num_stages=STAGES):
        token = start + t
        # nothing beyond the position is touched: its page may not exist
        real_th = (token < last)[:, None] & real_h[None, :]
        where_th = base + token.to(tl.int64)[:, None] * token_stride + h[None, :]
        k_th = tl.load(k + where_th, mask=real_th, other=0.0)
        v_th = tl.load(v + where_th, mask=real_th, other=0.0)
        score_gt = tl.dot(q_gh, tl.trans(k_th), input_precision="ieee")
        score_gt = tl.where((token < last)[None, :], score_gt * scale, -float("inf"))
        highest_g, sum_g, out_gh = _fold(score_gt, v_th, highest_g, sum_g, out_gh)

    if first + size > position:  # the part of the new token, which the other programs need not see
        k_h = _rotated(k_new + row * k_stride, kv_head * H, cos_h, sin_h, h, real_h, H)
        v_h = tl.load(v_new + row * v_stride + kv_head * H + h, mask=real_h, other=0.0)
        new_h = base + position.to(tl.int64) * token_stride + h
        tl.store(k + new_h, k_h, mask=real_h)
        tl.store(v + new_h, v_h, mask=real_h)
        score_g = tl.sum(q_gh.to(tl.float32) * k_h.to(tl.float32)[None, :], 1) * scale
        new_highest_g = tl.maximum(highest_g, score_g)
        weight_g, shrink_g = tl.exp(score_g - new_highest_g), tl.exp(highest_g - new_highest_g)
        sum_g = sum_g * shrink_g + weight_g
        out_gh = out_gh * shrink_g[:, None] + weight_g[:, None] * v_h.to(tl.float32)[None, :]
        highest_g = new_highest_g

    place_g = row * K * G + head_g
    where_gh = place_g[:, None] * H + h[None, :]
    if parts == 1:
        rounded_gh = (out_gh / sum_g[:, None]).to(out.dtype.element_ty)
        tl.store(out + where_gh, rounded_gh, mask=real_gh)
        if THEN:
            for i in range(G):
                out_h = tl.sum(tl.where((g == i)[:, None], rounded_gh.to(tl.float32), 0.0), 0)
                entry_h = (kv_head * G + i) * H + h
                list_largest(
                    out_h, entry_h, real_h, keep, kept_before, kept_scale, None,
                    kept_index, kept_value, kept_squares, kv_head * G + i, GROUP,
                )  # fmt: skip
    else:
        # of each head: its parts' sums of values, then their highest scores, then their sums of weights
        partial_g = partial + place_g * PARTS * (H + 2)
        tl.store(partial_g[:, None] + part * H + h[None, :], out_gh, mask=real_gh)
        tl.store(partial_g + PARTS * H + part, highest_g, mask=g < G)
        tl.store(partial_g + PARTS * (H + 1) + part, sum_g, mask=g < G)
        tl.debug_barrier()
        ticket = tickets + row * K + kv_head
        if tl.atomic_add(ticket, 1, sem="acq_rel") == parts - 1:
            p = tl.arange(0, BLOCK_P)
            for i in range(G):
                head = row * K * G + kv_head * G + i
                from_ = partial + head * PARTS * (H + 2)
                real_ph = (p < parts)[:, None] & real_h[None, :]
                # past the cache of this processor, which does not see what others write
                highest_p = tl.load(from_ + PARTS * H + p, mask=p < parts, other=-float("inf"), cache_modifier=".cg")
                sum_p = tl.load(from_ + PARTS * (H + 1) + p, mask=p < parts, other=0.0, cache_modifier=".cg")
                weight_p = tl.exp(highest_p - tl.max(highest_p, 0))
                out_ph = tl.load(from_ + p[:, None] * H + h[None, :], mask=real_ph, other=0.0, cache_modifier=".cg")
                out_h = tl.sum(weight_p[:, None] * out_ph, 0) / tl.sum(weight_p * sum_p, 0)
                rounded_h = out_h.to(out.dtype.element_ty)
                tl.store(out + head * H + h, rounded_h, mask=real_h)
                if THEN:
                    list_largest(
                        rounded_h.to(tl.float32), head * H + h, real_h, keep, kept_before, kept_scale, None,
                        kept_index, kept_value, kept_squares, head, GROUP,
                    )  # fmt: skip
            tl.store(ticket, 0)  # for the next launch


def decode_attention_triton(
    q_RNH: Tensor,
    k_RKH: Tensor,
    v_RKH: Tensor,
    rope: tuple[Tensor, Tensor],
    k_STKH: Tensor,
    v_STKH: Tensor,
    slots_R: Tensor,
    positions_R: Tensor,
    then: Groups | None = None,
) -> tuple[Tensor, Listed | None]:
    """Same contract as `decode_attention`. Products in the dtype of the cache, sums in fp32."""
    rows, heads, dim = q_RNH.shape
    kv_heads = k_STKH.shape[2]
    shared = heads // kv_heads
    types = {x.dtype for x in (q_RNH, k_RKH, v_RKH, k_STKH, v_STKH)}
    assert len(types) == 1, "queries, keys and values must be of one type"
    for x in (q_RNH, k_RKH, v_RKH):
        assert x.stride()[1:] == (dim, 1), "the heads of a new token must be contiguous"
    assert k_STKH.stride() == v_STKH.stride(), "keys and values must have the same strides"
    assert k_STKH.stride()[2:] == (dim, 1), "the heads of a token must be contiguous"
    cos_RH, sin_RH = (x.to(torch.float32).contiguous() for x in rope)
    out_RNH = torch.empty(rows, heads, dim, dtype=q_RNH.dtype, device=q_RNH.device)
    if not rows:
        return out_RNH, None
    assert then is None or rows == 1, "only a row alone is listed"
    kept = None if then is None else empty_list(then, out_RNH.dtype, heads, out_RNH.device)
    parts = min(triton.cdiv(PROGRAMS, rows * kv_heads), triton.cdiv(k_STKH.shape[1], SMALLEST_PART), MOST_PARTS)
    partial = torch.empty(rows * heads * parts * (dim + 2), dtype=torch.float32, device=q_RNH.device)
    pdl = overlaps(q_RNH.device)
    # the parts are the slowest dimension of the grid, so that the empty ones come last
    _attend[(kv_heads, rows, parts)](
        q_RNH, k_RKH, v_RKH, cos_RH, sin_RH, k_STKH.data_ptr(), v_STKH.data_ptr(), slots_R, positions_R,
        out_RNH, partial, tickets_of(k_STKH, rows * kv_heads),
        q_RNH.stride(0), k_RKH.stride(0), v_RKH.stride(0), k_STKH.stride(0), k_STKH.stride(1), dim**-0.5,
        *((None,) * 3 if then is None else (then.keep_G, then.first_G, then.scale_D)),
        *((None,) * 3 if kept is None else kept),
        K=kv_heads, G=shared, H=dim, PARTS=parts, SMALLEST=SMALLEST_PART,
        ALIGNED=16 if k_STKH.data_ptr() % 16 == v_STKH.data_ptr() % 16 == 0 else 1, STAGES=STAGES,
        BLOCK_T=64 if q_RNH.dtype.itemsize == 2 else 32,
        # tensor cores want 16 rows: for fewer heads most of what they do is for nothing, and they are still faster
        BLOCK_G=max(16, triton.next_power_of_2(shared)), BLOCK_H=max(16, triton.next_power_of_2(dim)),
        BLOCK_P=triton.next_power_of_2(parts), PDL=pdl,
        THEN=then is not None, GROUP=GROUP, num_warps=WARPS, **overlapping(pdl),
    )  # fmt: skip
    return out_RNH, kept
