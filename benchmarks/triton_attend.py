"""Attention of one new token per row in one kernel, for `sparse_decode.py`: rotary positions, the cache, split keys.

Shapes: R rows, T tokens, N heads (none share keys), H head dim, P parts.
"""
# pyright: reportMissingImports=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

PARTS = 4


@triton.jit
def _attend(
    qkv, cache_k, cache_v, position, out, partial, tickets, scale, log_theta, tokens,
    N: tl.constexpr, H: tl.constexpr, PARTS: tl.constexpr, BLOCK_T: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    head, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    HALF: tl.constexpr = H // 2
    h, w, t = tl.arange(0, HALF), tl.arange(0, H), tl.arange(0, BLOCK_T)
    past = tl.load(position)
    angle = past.to(tl.float32) * tl.exp(-h.to(tl.float32) / HALF * log_theta)
    cos, sin = tl.cos(angle), tl.sin(angle)
    q = qkv + row * 3 * N * H + head * H
    k = q + N * H
    q1, q2 = tl.load(q + h).to(tl.float32), tl.load(q + HALF + h).to(tl.float32)
    k1, k2 = tl.load(k + h).to(tl.float32), tl.load(k + HALF + h).to(tl.float32)
    v = tl.load(q + 2 * N * H + w)
    q1, q2 = (q1 * cos - q2 * sin) * scale, (q2 * cos + q1 * sin) * scale
    k1, k2 = k1 * cos - k2 * sin, k2 * cos + k1 * sin

    base = (row * tokens * N + head) * H
    highest, total = -float("inf"), 0.0
    out_w = tl.zeros([H], tl.float32)
    if part == 0:  # which has the new token too
        new = base + past * N * H
        tl.store(cache_k + new + h, k1.to(cache_k.dtype.element_ty))
        tl.store(cache_k + new + HALF + h, k2.to(cache_k.dtype.element_ty))
        tl.store(cache_v + new + w, v)
        highest, total = tl.sum(q1 * k1 + q2 * k2, 0), 1.0
        out_w = v.to(tl.float32)
    size = tl.cdiv(tl.cdiv(past, PARTS), BLOCK_T) * BLOCK_T
    last = tl.minimum((part + 1) * size, past)
    for start in range(part * size, last, BLOCK_T):
        real_t = start + t < last
        where_t = base + (start + t) * N * H
        k1_th = tl.load(cache_k + where_t[:, None] + h[None, :], mask=real_t[:, None], other=0.0).to(tl.float32)
        k2_th = tl.load(cache_k + where_t[:, None] + HALF + h[None, :], mask=real_t[:, None], other=0.0).to(tl.float32)
        v_tw = tl.load(cache_v + where_t[:, None] + w[None, :], mask=real_t[:, None], other=0.0).to(tl.float32)
        score_t = tl.where(real_t, tl.sum(k1_th * q1[None, :] + k2_th * q2[None, :], 1), -float("inf"))
        new_highest = tl.maximum(highest, tl.max(score_t, 0))
        weight_t = tl.exp(score_t - new_highest)
        shrink = tl.exp(highest - new_highest)
        total = total * shrink + tl.sum(weight_t, 0)
        out_w = out_w * shrink + tl.sum(weight_t[:, None] * v_tw, 0)
        highest = new_highest

    place = partial + (row * N + head) * PARTS * (H + 2)
    tl.store(place + part * H + w, out_w)
    tl.store(place + PARTS * H + part, highest)
    tl.store(place + PARTS * (H + 1) + part, total)
    tl.debug_barrier()
    ticket = tickets + row * N + head
    if tl.atomic_add(ticket, 1, sem="acq_rel") == PARTS - 1:
        p = tl.arange(0, PARTS)
        highest_p = tl.load(place + PARTS * H + p, cache_modifier=".cg")
        share_p = tl.exp(highest_p - tl.max(highest_p, 0))
        total = tl.sum(share_p * tl.load(place + PARTS * (H + 1) + p, cache_modifier=".cg"), 0)
        out_pw = tl.load(place + p[:, None] * H + w[None, :], cache_modifier=".cg")
        y_w = tl.sum(out_pw * share_p[:, None], 0) / total
        tl.store(out + (row * N + head) * H + w, y_w.to(out.dtype.element_ty))
        tl.store(ticket, 0)


def attend(
    qkv_RF: Tensor, cache_k: Tensor, cache_v: Tensor, position: Tensor, tickets: Tensor, *, theta: float, pdl: bool
) -> Tensor:
    """`(R, N x H)`; the new token's key and value go to the cache.

    Args:
        qkv_RF: Queries, keys, values of the new token, not yet rotated.
        cache_k: `(R, T, N, H)`.
        cache_v: `(R, T, N, H)`.
        position: How many tokens the cache has, on the device.
        tickets: `(R, N)` zeros, int32.
        theta: Of the rotary positions.
        pdl: Whether to start while the kernel before this one ends.
    """
    rows, tokens, heads, dim = cache_k.shape
    out_RF = qkv_RF.new_empty(rows, heads * dim)
    partial = torch.empty(rows, heads, PARTS, dim + 2, dtype=torch.float32, device=qkv_RF.device)
    _attend[(heads, PARTS, rows)](
        qkv_RF, cache_k, cache_v, position, out_RF, partial, tickets, dim**-0.5,
        float(torch.tensor(theta).log()), tokens,
        N=heads, H=dim, PARTS=PARTS, BLOCK_T=32, PDL=pdl, num_warps=4, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out_RF
