"""Triton kernel behind `kernels/group_select.py`, and the part of it that other kernels end with.

An entry's rank is the number of entries of its group that come before it: all pairs are compared at once.
Shapes: D entries, G groups, N entries of a group, F entries of a program, P parts of a sum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from raygrow.kernels.group_select import GROUP, Groups, Listed

ENTRIES = 128
"""Of a program."""


@triton.jit
def list_largest(y_f, f, real_f, keep, first, scale, gain, index, value, squares, part, GROUP: tl.constexpr):
    """Lists what is kept of whole groups, in their places, and stores the sum of their squares.

    The entries are in fp32, as exact as they are stored; `f` says which they are, from a multiple of GROUP on.
    """
    tl.store(squares + part, tl.sum(tl.where(real_f, y_f * y_f, 0.0), 0))
    value_type = value.dtype.element_ty
    if gain is not None:
        y_f = (y_f * tl.load(gain + f, mask=real_f, other=0.0).to(tl.float32)).to(value_type).to(tl.float32)
    score_f = tl.abs(y_f)
    if scale is not None:
        score_f *= tl.load(scale + f, mask=real_f, other=0.0).to(tl.float32)
    G: tl.constexpr = f.shape[0] // GROUP
    score_f = tl.where(score_f == score_f, score_f, float("inf"))  # what is no number is kept, and shows
    score_gn = tl.reshape(tl.where(real_f, score_f, -1.0), [G, GROUP])
    f_gn, real_gn, y_gn = tl.reshape(f, [G, GROUP]), tl.reshape(real_f, [G, GROUP]), tl.reshape(y_f, [G, GROUP])
    n = tl.arange(0, GROUP)
    earlier_nm = (n[None, :] < n[:, None])[None, :, :]
    one_gnm, other_gnm = score_gn[:, :, None], score_gn[:, None, :]
    rank_gn = tl.sum(((other_gnm > one_gnm) | ((other_gnm == one_gnm) & earlier_nm)).to(tl.int32), 2)
    keep_gn = tl.load(keep + f_gn // GROUP, mask=real_gn, other=0)
    kept_gn = rank_gn < keep_gn
    before_gn = tl.sum((kept_gn[:, None, :] & earlier_nm).to(tl.int32), 2)
    place_gn = tl.load(first + f_gn // GROUP, mask=real_gn, other=0) + before_gn
    tl.store(index + place_gn, f_gn, mask=kept_gn)
    tl.store(value + place_gn, y_gn.to(value_type), mask=kept_gn)


@triton.jit
def _list_groups(
    x, keep, first, scale, gain, index, value, squares, D: tl.constexpr, ENTRIES: tl.constexpr, GROUP: tl.constexpr
):
    part = tl.program_id(0)
    f = part * ENTRIES + tl.arange(0, ENTRIES)
    x_f = tl.load(x + f, mask=f < D, other=0.0).to(tl.float32)
    list_largest(x_f, f, f < D, keep, first, scale, gain, index, value, squares, part, GROUP)


def list_groups_triton(x_1D: Tensor, groups: Groups) -> Listed:
    """Same contract as `list_groups`."""
    assert x_1D.is_contiguous(), "a row must be contiguous"
    size = x_1D.shape[1]
    listed = empty_list(groups, x_1D.dtype, triton.cdiv(size, ENTRIES), x_1D.device)
    _list_groups[(triton.cdiv(size, ENTRIES),)](
        x_1D, groups.keep_G, groups.first_G, groups.scale_D, groups.gain_D, *listed,
        D=size, ENTRIES=ENTRIES, GROUP=GROUP, num_warps=4,
    )  # fmt: skip
    return listed


def empty_list(groups: Groups, dtype: torch.dtype, parts: int, device: torch.device) -> Listed:
    """Room for what is kept."""
    return Listed(
        torch.empty(groups.keep, dtype=torch.int32, device=device),
        torch.empty(groups.keep, dtype=dtype, device=device),
        torch.empty(parts, dtype=torch.float32, device=device),
    )
