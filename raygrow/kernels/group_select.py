"""The largest entries of each group of neighbours, as many of every row.

One program of a product makes whole groups. So a product chooses from its own output what the next one reads
(`kernels/list_linear.py`): nothing waits for all of a row, as it would have to for the largest entries of the whole.

`list_groups` picks the Triton kernel on CUDA and its torch twin elsewhere.
Shapes: R rows, D entries, G groups, N entries of a group, K kept, P parts of a sum.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from raygrow.kernels.sparse_linear import scored

GROUP = 32
"""Entries of a group; the last one may have fewer."""


class Groups(NamedTuple):
    """What is kept of a row."""

    keep: int
    """Entries in all."""
    keep_G: Tensor
    """Entries of each group, int32."""
    first_G: Tensor
    """Those of all groups before it, int32."""
    scale_D: Tensor | None = None
    """Factors on the magnitudes, for scores; None for none."""
    gain_D: Tensor | None = None
    """Factors on the entries themselves, such as a norm's gains, before anything else."""


class Listed(NamedTuple):
    """Kept entries of one row."""

    index_K: Tensor
    """Which they are, in ascending order, int32."""
    value_K: Tensor
    """What they are, gains included."""
    squares_P: Tensor
    """Sums of squares of the row's entries, all of them and without gains: its norm, for whoever needs one. fp32 or,
    of a row in fp64, that."""


def groups_of(counts: Sequence[int], device: torch.device, scale_D: Tensor | None = None) -> Groups:
    """Groups of which each keeps its own number of entries, on the device that the rows are on."""
    keep_G = torch.tensor(counts, dtype=torch.int32, device=device)
    return Groups(sum(counts), keep_G, keep_G.cumsum(0, dtype=torch.int32) - keep_G, scale_D)


def group_sizes(size: int) -> tuple[int, ...]:
    """How many entries each group of so many has."""
    return tuple(min(GROUP, size - first) for first in range(0, size, GROUP))


def ranked(score_RD: Tensor) -> Tensor:
    """Each group's scores, the largest first, `(R, G, N)`; -1 where the last group has no entry."""
    return _grouped(score_RD).sort(dim=-1, descending=True).values


def group_kept(score_RD: Tensor, keep_G: Tensor) -> Tensor:
    """Which entries are among the largest of their group, `(R, D)` of bool; of equal ones, those that come first.

    Args:
        score_RD: Not negative.
        keep_G: How many of each group.
    """
    order_RGN = _grouped(score_RD).argsort(dim=-1, descending=True, stable=True)
    places_RGN = torch.arange(GROUP, device=score_RD.device).expand_as(order_RGN)
    rank_RGN = torch.empty_like(order_RGN).scatter_(-1, order_RGN, places_RGN)
    return (rank_RGN < keep_G[:, None]).flatten(1)[:, : score_RD.shape[1]]


def list_groups(x_1D: Tensor, groups: Groups) -> Listed:
    """The entries of one row that are kept.

    Args:
        x_1D: Contiguous.
        groups: What is kept of it.
    """
    if x_1D.is_cuda and x_1D.dtype != torch.float64:
        from raygrow.kernels.triton_group_select import list_groups_triton

        return list_groups_triton(x_1D, groups)
    return list_groups_torch(x_1D, groups)


def list_groups_torch(x_1D: Tensor, groups: Groups) -> Listed:
    """The torch twin of `list_groups`."""
    wide_1D = x_1D.to(torch.promote_types(x_1D.dtype, torch.float32))
    if groups.gain_D is not None:
        x_1D = (wide_1D * groups.gain_D).to(x_1D.dtype)
    index_K = group_kept(scored(x_1D, groups.scale_D), groups.keep_G)[0].nonzero()[:, 0]
    return Listed(index_K.to(torch.int32), x_1D[0, index_K], wide_1D.square().sum(1))


def _grouped(score_RD: Tensor) -> Tensor:
    return F.pad(score_RD, (0, -score_RD.shape[1] % GROUP), value=-1.0).unflatten(1, (-1, GROUP))
