"""Triton kernels behind `kernels/sparse_linear.py` and `zeros.py`: few rows times the rows of a weight that they need.

A program multiplies one tile of the weight's columns with every so-many-th chunk of the rows that are to be read, so
that a small product keeps all of a GPU busy. The parts of a tile are put together by its last program, in a fixed
order: the result is the same in every run, and no second kernel is launched.

Shapes: R rows, D input, K rows of the weight that are read, F output, E experts, S parts.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from raygrow.kernels.triton_epilogue import finish, gate
from raygrow.kernels.triton_launch import overlapping, overlaps, tickets_of


class Tiling(NamedTuple):
    """How a product is cut up."""

    columns: int
    """Of a tile; gated, of each half."""
    chunk: int
    """Rows of the weight that a program reads at a time."""
    parts: int
    """Programs that share a tile."""
    warps: int
    stages: int
    """Chunks on their way at a time; 1 leaves it to the compiler."""


@triton.jit
def _sum_parts(place, parts, part_stride, f, real_f):
    """The sum over a tile's parts, past the cache of this processor, which does not see what others write."""
    s = tl.arange(0, 16)
    sum_sf = tl.zeros([16, f.shape[0]], tl.float32)
    for first in range(0, parts, 16):
        real_sf = (first + s < parts)[:, None] & real_f[None, :]
        where_sf = place + (first + s)[:, None] * part_stride + f[None, :]
        sum_sf += tl.load(where_sf, mask=real_sf, other=0.0, cache_modifier=".cg")
    return tl.sum(sum_sf, 0)


@triton.jit(do_not_specialize=["keep"])
def _row_products(
    index, value, weight, expert, bias, addend, out, partial, tickets, keep, size,
    F: tl.constexpr, GATED: tl.constexpr, SKIP_ZEROS: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row with its rows of the weight: those of a list, or without a list all, or all whose value is not zero."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tile, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    parts = tl.num_programs(1)
    WIDTH: tl.constexpr = 2 * F if GATED else F
    f, k = tile * BLOCK_F + tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_K)
    real_f = f < F
    if expert is not None:
        weight += tl.load(expert + row).to(tl.int64) * size * WIDTH

    # summed over chunks entry by entry, over the entries of a chunk only once, at the end
    sum_kf = tl.zeros([BLOCK_K, BLOCK_F], tl.float32)
    if GATED:
        up_sum_kf = tl.zeros([BLOCK_K, BLOCK_F], tl.float32)
    for start in tl.range(part * BLOCK_K, keep, parts * BLOCK_K, num_stages=STAGES):
        real_k = start + k < keep
        value_k = tl.load(value + row * keep + start + k, mask=real_k, other=0.0)
        index_k = start + k if index is None else tl.load(index + row * keep + start + k, mask=real_k, other=0)
        if SKIP_ZEROS:
            real_k = real_k & (value_k != 0.0)
        where_kf = weight + index_k.to(tl.int64)[:, None] * WIDTH + f[None, :]
        real_kf = real_k[:, None] & real_f[None, :]
        w_kf = tl.load(where_kf, mask=real_kf, other=0.0, eviction_policy="evict_first")
        if GATED:
            up_kf = tl.load(where_kf + F, mask=real_kf, other=0.0, eviction_policy="evict_first")
            up_sum_kf += value_k.to(tl.float32)[:, None] * up_kf.to(tl.float32)
        sum_kf += value_k.to(tl.float32)[:, None] * w_kf.to(tl.float32)

    y_f = tl.sum(sum_kf, 0)
    if GATED:
        up_f = tl.sum(up_sum_kf, 0)
    if not SPLIT:
        if GATED:
            y_f = gate(y_f, up_f)
        finish(y_f, bias, addend, out, row * F + f, f, real_f)
    else:
        place = partial + row * parts * WIDTH
        tl.store(place + part * WIDTH + f, y_f, mask=real_f)
        if GATED:
            tl.store(place + part * WIDTH + F + f, up_f, mask=real_f)
        tl.debug_barrier()
        ticket = tickets + row * tl.num_programs(0) + tile
        if tl.atomic_add(ticket, 1, sem="acq_rel") == parts - 1:
            y_f = _sum_parts(place, parts, WIDTH, f, real_f)
            if GATED:
                y_f = gate(y_f, _sum_parts(place + F, parts, WIDTH, f, real_f))
            finish(y_f, bias, addend, out, row * F + f, f, real_f)
            tl.store(ticket, 0)  # for the next launch


@triton.jit(do_not_specialize=["rows"])
def _union_products(
    x, weight, bias, addend, out, partial, tickets, rows, size,
    F: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """All rows at once, by tensor cores, with the rows of the weight that any of them needs."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tile, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    r, f, k = tl.arange(0, BLOCK_R), tile * BLOCK_F + tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_K)
    real_r, real_f = r < rows, f < F
    real_rf = real_r[:, None] & real_f[None, :]
    sum_rf = tl.zeros([BLOCK_R, BLOCK_F], tl.float32)
    for start in tl.range(part * BLOCK_K, size, parts * BLOCK_K, num_stages=STAGES):
        index_k = start + k
        real_k = index_k < size
        x_rk = tl.load(x + r[:, None] * size + index_k[None, :], mask=real_r[:, None] & real_k[None, :], other=0.0)
        needed_k = tl.max((x_rk != 0.0).to(tl.int32), 0) > 0
        where_kf = weight + index_k.to(tl.int64)[:, None] * F + f[None, :]
        real_kf = needed_k[:, None] & real_f[None, :]
        w_kf = tl.load(where_kf, mask=real_kf, other=0.0, eviction_policy="evict_first")
        sum_rf = tl.dot(x_rk, w_kf, sum_rf, input_precision="ieee")

    features_rf = f[None, :] + tl.zeros_like(r)[:, None]
    out_rf = r[:, None] * F + features_rf
    if not SPLIT:
        finish(sum_rf, bias, addend, out, out_rf, features_rf, real_rf)
    else:
        place_rf = partial + r[:, None] * parts * F + features_rf
        tl.store(place_rf + part * F, sum_rf, mask=real_rf)
        tl.debug_barrier()
        if tl.atomic_add(tickets + tile, 1, sem="acq_rel") == parts - 1:
            sum_rf = tl.zeros([BLOCK_R, BLOCK_F], tl.float32)
            for s in range(parts):
                sum_rf += tl.load(place_rf + s * F, mask=real_rf, other=0.0, cache_modifier=".cg")
            finish(sum_rf, bias, addend, out, out_rf, features_rf, real_rf)
            tl.store(tickets + tile, 0)


def sparse_linear_triton(
    index_RK: Tensor | None,
    value_RK: Tensor,
    weight: Tensor,
    *,
    expert_R: Tensor | None = None,
    bias_F: Tensor | None = None,
    addend_RF: Tensor | None = None,
    gated: bool = False,
    skip_zeros: bool = False,
    tiling: Tiling | None = None,
) -> Tensor:
    """Same contract as `sparse_linear` and `sparse_expert_linear`.

    Args:
        index_RK: Which rows of the weight; None is all of them, and `value_RK` then has D entries.
        value_RK: What they are multiplied by.
        weight: `(D, F)`, or with experts `(E, D, F)`.
        expert_R: Whose weight each row takes.
        bias_F: Added.
        addend_RF: Added.
        gated: Whether the weight is a gate beside what it is applied to.
        skip_zeros: Without indices: rows of the weight that are multiplied by zero are not read.
        tiling: How the work is cut up.
    """
    rows, keep = value_RK.shape
    features = weight.shape[-1] // 2 if gated else weight.shape[-1]
    _check_contiguous(index_RK, value_RK, weight, expert_R, addend_RF)
    out_RF = weight.new_empty(rows, features)
    if not rows:
        return out_RF
    cut = tiling or row_tiling(keep, features, rows, gated=gated, device=weight.device)
    pdl = overlaps(weight.device)
    tiles = triton.cdiv(features, cut.columns)
    partial = torch.empty(rows * cut.parts * weight.shape[-1], dtype=torch.float32, device=weight.device)
    tickets = tickets_of(weight, rows * tiles)
    _row_products[(tiles, cut.parts, rows)](
        index_RK, value_RK, weight, expert_R, bias_F, addend_RF, out_RF, partial, tickets,
        keep, weight.shape[-2], F=features, GATED=gated, SKIP_ZEROS=skip_zeros,
        BLOCK_F=cut.columns, BLOCK_K=cut.chunk, SPLIT=cut.parts > 1, STAGES=cut.stages, PDL=pdl,
        num_warps=cut.warps, **overlapping(pdl),
    )  # fmt: skip
    return out_RF


def nonzero_linear_triton(
    x_RD: Tensor,
    weight_DF: Tensor,
    *,
    bias_F: Tensor | None = None,
    addend_RF: Tensor | None = None,
    tiling: Tiling | None = None,
) -> Tensor:
    """Same contract as `zeros.nonzero_linear`, of at most 16 rows. Arguments as of `sparse_linear_triton`."""
    rows, size = x_RD.shape
    features = weight_DF.shape[1]
    _check_contiguous(x_RD, weight_DF, addend_RF)
    assert rows <= 16, f"{rows} rows: at most 16 share a product"
    out_RF = weight_DF.new_empty(rows, features)
    if not rows:
        return out_RF
    cut = tiling or union_tiling(size, features, device=weight_DF.device)
    pdl = overlaps(weight_DF.device)
    tiles = triton.cdiv(features, cut.columns)
    partial = torch.empty(rows * cut.parts * features, dtype=torch.float32, device=weight_DF.device)
    tickets = tickets_of(weight_DF, tiles)
    _union_products[(tiles, cut.parts)](
        x_RD, weight_DF, bias_F, addend_RF, out_RF, partial, tickets, rows, size,
        F=features, BLOCK_R=16,
        BLOCK_F=cut.columns, BLOCK_K=cut.chunk, SPLIT=cut.parts > 1, STAGES=cut.stages, PDL=pdl,
        num_warps=cut.warps, **overlapping(pdl),
    )  # fmt: skip
    return out_RF


def _check_contiguous(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        assert tensor is None or tensor.is_contiguous(), "all that a product takes must be contiguous"


def row_tiling(keep: int, features: int, rows: int, *, gated: bool, device: torch.device) -> Tiling:
    """The tiling of a product of rows, each with its own rows of the weight."""
    columns = min(128 if gated else 256, max(triton.next_power_of_2(features), 16))
    return spread(Tiling(columns, 16, 1, 4, 1), keep, features, rows, per_processor=4, device=device)


def union_tiling(size: int, features: int, *, device: torch.device) -> Tiling:
    """The tiling of a product of rows that share what they read."""
    columns = min(128, max(triton.next_power_of_2(features), 16))
    return spread(Tiling(columns, 64, 1, 4, 3), size, features, 1, per_processor=3, device=device)


def spread(cut: Tiling, keep: int, features: int, rows: int, *, per_processor: int, device: torch.device) -> Tiling:
    """The tiling with as many parts as make one wave of programs, the chunks evenly spread over them."""
    tiles = triton.cdiv(features, cut.columns) * rows
    chunks = triton.cdiv(keep, cut.chunk)
    parts = min(max(processors(device) * per_processor // tiles, 1), chunks, 64)
    return cut._replace(parts=triton.cdiv(chunks, triton.cdiv(chunks, parts)))


@cache
def processors(device: torch.device) -> int:
    """How many programs truly run at a time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
