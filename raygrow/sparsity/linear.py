"""Projections that read only the weights of the entries that are kept.

Shapes: B batch, T tokens, R rows (all tokens of the batch), D input, F output of all projections together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raygrow.kernels.group_select import Groups, Listed, list_groups
from raygrow.kernels.list_linear import list_linear
from raygrow.kernels.row_linear import Around
from raygrow.kernels.sparse_linear import (
    Selection,
    masked_linear,
    norm_above,
    norm_masked,
    norm_select,
    select,
    sparse_linear,
)
from raygrow.kernels.threshold_linear import threshold_linear
from raygrow.nn.joined import joined_bias, with_norm
from raygrow.nn.linear import constant
from raygrow.sparsity.methods import Selector, column_norms


@dataclass
class SparseRows:
    """Which tokens of a forward pass are sparse: `start` to `stop` along T. One object tells all modules of a model."""

    start: int = 0
    stop: int | None = None
    """None is to the end."""

    def within(self, n: int) -> slice:
        """The sparse ones of `n` tokens."""
        stop = n if self.stop is None else min(self.stop, n)
        return slice(min(self.start, stop), stop)


class SparseLinear(nn.Module):
    """Projections that read the same input, as one over the entries that are kept, with what stands around them.

    A token alone reads what it keeps, several together everything, or on a CPU a few what each keeps. What a token
    keeps does not depend on those beside it. Where some tokens are sparse and others are not, they share one product.

    The weight is kept input-major, so that what a dropped entry saves lies in one piece.

    Args:
        projections: `nn.Linear`s of one input.
        rows: Which tokens are sparse.
        weighted: Whether scores are weighted by the norms of columns.
        norm: Of the input, which is part of the selection's kernel if it is an RMS norm.
        gated: Whether the projections are a gate and what it is applied to: the output is `silu(first) * second`.
            Not with biases.
    """

    bias_F: nn.Parameter | None

    def __init__(
        self,
        projections: Sequence[nn.Linear],
        *,
        rows: SparseRows,
        weighted: bool,
        norm: nn.Module | None = None,
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.sizes = [projection.out_features for projection in projections]
        self.rows, self.norm, self.gated = rows, norm, gated
        weight_DF = torch.cat([projection.weight.detach() for projection in projections]).T.contiguous()
        self.weight_DF = constant(weight_DF)
        self.register_parameter("bias_F", joined_bias(projections))
        scale_D = column_norms(weight_DF) if weighted else None
        self.selector = Selector(len(weight_DF), weight_DF.device, scale_D)
        self.readers: tuple[SparseLinear, ...] = ()  # a tuple, which torch.nn does not register
        """What reads the output as it is, if anything does: where it chooses by groups, it is told what it keeps."""
        self._told: tuple[Tensor, Listed] | None = None

    def forward(self, x_BTD: Tensor, addend_BTF: Tensor | None = None) -> Tensor:
        """`(B, T, D)` to the outputs side by side, or what is gated, plus what is to be added."""
        rows = self.rows.within(x_BTD.shape[1])
        addend_RF = None if addend_BTF is None else addend_BTF.flatten(0, 1).contiguous()
        alone = len(x_BTD) == x_BTD.shape[1] == 1 and rows == slice(0, 1)
        if alone and self.selector.drops:
            y_RF = self._of_one(x_BTD.flatten(0, 1).contiguous(), addend_RF)
        else:
            x_RD = only_kept(x_BTD, rows, self.selector, self.norm).flatten(0, 1).contiguous()
            y_RF = masked_linear(x_RD, self.weight_DF, self.bias_F, addend_RF=addend_RF, gated=self.gated)
        return y_RF.unflatten(0, x_BTD.shape[:2])

    def _of_one(self, x_1D: Tensor, addend_1F: Tensor | None) -> Tensor:
        """One token, which reads what it keeps."""
        threshold, scale_D = self.selector.choice.threshold, self.selector.scale_D
        around = Around(bias_F=self.bias_F, gated=self.gated, addend_RF=addend_1F)
        if groups := self.groups:
            return self._of_groups(x_1D, groups, around)
        if threshold is None:
            kept = selected(x_1D, self.selector, self.norm)
            return sparse_linear(kept, self.weight_DF, self.bias_F, addend_RF=addend_1F, gated=self.gated)
        x_1D, around = with_norm(self.norm, x_1D, around)
        return threshold_linear(x_1D, self.weight_DF, threshold, scale_D, around)

    @property
    def groups(self) -> Groups | None:
        """What is kept of what comes in, before any norm; None where that is not chosen by groups."""
        groups = self.selector.groups
        return groups and groups._replace(gain_D=self.norm.weight if isinstance(self.norm, nn.RMSNorm) else None)

    def tell(self, x_1D: Tensor, listed: Listed) -> None:
        """What is kept of a token alone, by whatever has made it."""
        self._told = x_1D, listed

    def _of_groups(self, x_1D: Tensor, groups: Groups, around: Around) -> Tensor:
        x_1D, around = with_norm(self.norm, x_1D, around)
        told, self._told = self._told, None
        # held until now, so nothing else can have come to lie where it is
        known = told and told[0].data_ptr() == x_1D.data_ptr()
        listed = told[1] if told and known else list_groups(x_1D, groups)
        then = next((reader.groups for reader in self.readers), None)
        y_1F, kept = list_linear(listed, self.weight_DF, around._replace(gain_D=None), then)
        if kept:
            self.readers[0].tell(y_1F, kept)
        return y_1F


def selected(x_RD: Tensor, selector: Selector, norm: nn.Module | None = None) -> Selection:
    """What is kept of rows, and of their norm where they get one first."""
    keep, scale_D = selector.choice.keep, selector.scale_D
    if isinstance(norm, nn.RMSNorm) and norm.eps is not None:
        return norm_select(x_RD, keep, norm.eps, norm.weight, scale_D)
    return select(x_RD if norm is None else norm(x_RD), keep, scale_D)


def only_kept(x_BTD: Tensor, rows: slice, selector: Selector, norm: nn.Module | None = None) -> Tensor:
    """All tokens, normed where they are to be; sparse ones with zeros in the place of what they drop."""
    choice, whole = selector.choice, rows == slice(0, x_BTD.shape[1])
    if whole and isinstance(norm, nn.RMSNorm) and norm.eps is not None:
        x_RD, around = x_BTD.flatten(0, 1).contiguous(), (norm.eps, norm.weight, selector.scale_D)
        if selector.lists:
            return norm_masked(x_RD, choice.keep, *around).view_as(x_BTD)
        if choice.threshold is not None and not selector.watched:
            return norm_above(x_RD, choice.threshold, *around).view_as(x_BTD)
    if norm is not None:
        x_BTD = norm(x_BTD)
    if not selector.drops or rows.start == rows.stop:
        return x_BTD
    some_BTD = x_BTD[:, rows]
    kept_BTD = selector.masked(some_BTD.flatten(0, 1).contiguous()).view_as(some_BTD)
    return kept_BTD if whole else torch.cat([x_BTD[:, : rows.start], kept_BTD, x_BTD[:, rows.stop :]], dim=1)
