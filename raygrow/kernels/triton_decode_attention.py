"""Triton kernels behind `kernels/decode_attention.py`: split-KV flash decoding.

One program reads one part of one row's keys and values of one key-value head, for all the heads that share it; a
second kernel puts the parts together. How a row is split depends on its length alone, so its result does not depend on
the rows beside it; parts that a row does not have return at once.

Shapes: R rows, S slots, T tokens, N heads, K key-value heads, G heads that share one, H head dim, P parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_PARTS = 16
"""Of a row: enough for one sequence to keep a GPU busy, few enough that empty ones cost little."""
SMALLEST_PART = 256
"""Tokens; a smaller part is not worth a program."""


@triton.jit
def _part_tokens(length, PARTS: tl.constexpr, SMALLEST: tl.constexpr, BLOCK_T: tl.constexpr):
    """Tokens in each part of a row: whole blocks."""
    return tl.maximum(tl.cdiv(tl.cdiv(length, PARTS), BLOCK_T) * BLOCK_T, SMALLEST)


@triton.jit
def _attend_part(
    q, k, v, slots, lengths, partial, maxima, sums,
    slot_stride, token_stride, scale,
    K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, PARTS: tl.constexpr, SMALLEST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    # addresses, not tensors: a launch would look at the first byte of a tensor, whose page may not exist
    k = k.to(tl.pointer_type(q.dtype.element_ty))
    v = v.to(tl.pointer_type(q.dtype.element_ty))
    kv_head, row, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row).to(tl.int32)
    size = _part_tokens(length, PARTS, SMALLEST, BLOCK_T)
    first = part * size
    if first >= length:
        return
    last = tl.minimum(first + size, length)

    g, h, t = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_T)
    head = row.to(tl.int64) * K * G + kv_head * G + g
    real_gh = (g < G)[:, None] & (h < H)[None, :]
    q_gh = tl.load(q + head[:, None] * H + h[None, :], mask=real_gh, other=0.0)
    base = tl.load(slots + row).to(tl.int64) * slot_stride + kv_head * H

    highest_g = tl.full([BLOCK_G], -float("inf"), tl.float32)
    sum_g = tl.zeros([BLOCK_G], tl.float32)
    out_gh = tl.zeros([BLOCK_G, BLOCK_H], tl.float32)
    for start in range(first, last, BLOCK_T):
        token = start + t
        # nothing beyond the length is touched: its page may not exist
        real_th = (token < last)[:, None] & (h < H)[None, :]
        where_th = base + token.to(tl.int64)[:, None] * token_stride + h[None, :]
        k_th = tl.load(k + where_th, mask=real_th, other=0.0)
        v_th = tl.load(v + where_th, mask=real_th, other=0.0)
        if G == 1:  # a product of vectors: tensor cores want 16 rows
            score_gt = tl.sum(q_gh.to(tl.float32) * k_th.to(tl.float32), 1)[None, :]
        else:
            score_gt = tl.dot(q_gh, tl.trans(k_th), input_precision="ieee")
        score_gt = tl.where((token < last)[None, :], score_gt * scale, -float("inf"))
        new_highest_g = tl.maximum(highest_g, tl.max(score_gt, 1))
        weight_gt = tl.exp(score_gt - new_highest_g[:, None])
        shrink_g = tl.exp(highest_g - new_highest_g)
        sum_g = sum_g * shrink_g + tl.sum(weight_gt, 1)
        if G == 1:
            product_gh = tl.sum(tl.trans(weight_gt) * v_th.to(tl.float32), 0)[None, :]
        else:
            product_gh = tl.dot(weight_gt.to(v_th.dtype), v_th, input_precision="ieee")
        out_gh = out_gh * shrink_g[:, None] + product_gh
        highest_g = new_highest_g

    place_g = head * PARTS + part
    tl.store(partial + place_g[:, None] * H + h[None, :], out_gh / sum_g[:, None], mask=real_gh)
    tl.store(maxima + place_g, highest_g, mask=g < G)
    tl.store(sums + place_g, sum_g, mask=g < G)


@triton.jit
def _combine_parts(
    partial, maxima, sums, lengths, out,
    N: tl.constexpr, H: tl.constexpr, PARTS: tl.constexpr, SMALLEST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + row).to(tl.int32)
    parts = tl.cdiv(length, _part_tokens(length, PARTS, SMALLEST, BLOCK_T))
    p, h = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_H)
    place_p = (row.to(tl.int64) * N + head) * PARTS + p
    real_ph = (p < parts)[:, None] & (h < H)[None, :]
    highest_p = tl.load(maxima + place_p, mask=p < parts, other=-float("inf"))
    sum_p = tl.load(sums + place_p, mask=p < parts, other=0.0)
    weight_p = tl.exp(highest_p - tl.max(highest_p, 0)) * sum_p
    out_ph = tl.load(partial + place_p[:, None] * H + h[None, :], mask=real_ph, other=0.0)
    out_h = tl.sum(weight_p[:, None] * out_ph, 0) / tl.sum(weight_p, 0)
    tl.store(out + (row.to(tl.int64) * N + head) * H + h, out_h.to(out.dtype.element_ty), mask=h < H)


def decode_attention_triton(
    q_RNH: Tensor, k_STKH: Tensor, v_STKH: Tensor, slots_R: Tensor, lengths_R: Tensor
) -> Tensor:
    """Same contract as `decode_attention`. Products in the dtype of the cache, sums in fp32."""
    rows, heads, dim = q_RNH.shape
    kv_heads = k_STKH.shape[2]
    shared = heads // kv_heads
    assert q_RNH.is_contiguous(), "queries must be contiguous"
    assert q_RNH.dtype == k_STKH.dtype == v_STKH.dtype, "queries, keys and values must be of one type"
    assert k_STKH.stride() == v_STKH.stride(), "keys and values must have the same strides"
    assert k_STKH.stride()[2:] == (dim, 1), "the heads of a token must be contiguous"
    parts = min(MOST_PARTS, triton.cdiv(k_STKH.shape[1], SMALLEST_PART))
    block_t = 64 if q_RNH.dtype.itemsize == 2 else 32
    block_h = triton.next_power_of_2(dim)
    out_RNH = torch.empty_like(q_RNH)
    partial_RNPH = torch.empty(rows, heads, parts, dim, dtype=torch.float32, device=q_RNH.device)
    maxima_RNP, sums_RNP = torch.empty(2, rows, heads, parts, dtype=torch.float32, device=q_RNH.device)
    if not rows:
        return out_RNH
    # the parts are the slowest dimension of the grid, so that the empty ones come last
    _attend_part[(kv_heads, rows, parts)](
        q_RNH, k_STKH.data_ptr(), v_STKH.data_ptr(), slots_R, lengths_R, partial_RNPH, maxima_RNP, sums_RNP,
        k_STKH.stride(0), k_STKH.stride(1), dim**-0.5,
        K=kv_heads, G=shared, H=dim, PARTS=parts, SMALLEST=SMALLEST_PART,
        BLOCK_T=block_t, BLOCK_G=1 if shared == 1 else max(16, triton.next_power_of_2(shared)),
        BLOCK_H=block_h if shared == 1 else max(16, block_h),
        num_warps=4, num_stages=2,
    )  # fmt: skip
    _combine_parts[(heads, rows)](
        partial_RNPH, maxima_RNP, sums_RNP, lengths_R, out_RNH,
        N=heads, H=dim, PARTS=parts, SMALLEST=SMALLEST_PART,
        BLOCK_T=block_t, BLOCK_P=triton.next_power_of_2(parts), BLOCK_H=block_h,
        num_warps=4,
    )  # fmt: skip
    return out_RNH
