"""Projections that read only the weights of the entries that are kept.

Shapes: B batch, T tokens, R rows (tokens that are sparse), D input, F output of all projections together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raygrow.kernels.sparse_linear import masked_linear, select, sparse_linear
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


def linear_of_kept(x_RD: Tensor, selector: Selector, weight_DF: Tensor) -> Tensor:
    """`x @ weight` over the entries that the selector keeps: the one place that knows how it is computed.

    A row alone reads what it keeps, a few together what any of them keeps, many everything; what a row keeps does not
    depend on those beside it.
    """
    if not selector.drops or not len(x_RD):
        return x_RD @ weight_DF
    if len(x_RD) == 1 and selector.choice.threshold is None:
        return sparse_linear(select(x_RD, selector.choice.keep, selector.scale_D), weight_DF)
    return masked_linear(selector.masked(x_RD), weight_DF)


class SparseLinear(nn.Module):
    """Projections that read the same input, as one over the entries that are kept.

    The weight is kept input-major, so that what a dropped entry saves lies in one piece.

    Args:
        projections: `nn.Linear`s of one input.
        rows: Which tokens are sparse.
        weighted: Whether scores are weighted by the norms of columns.
    """

    bias_F: nn.Parameter | None

    def __init__(self, projections: Sequence[nn.Linear], rows: SparseRows, *, weighted: bool) -> None:
        super().__init__()
        self.sizes = [projection.out_features for projection in projections]
        self.rows = rows
        weight_DF = torch.cat([projection.weight.detach() for projection in projections]).T.contiguous()
        self.weight_DF = nn.Parameter(weight_DF, requires_grad=False)
        bias_F = None
        if projections[0].bias is not None:
            bias_F = nn.Parameter(torch.cat([p.bias.detach() for p in projections]), requires_grad=False)
        self.register_parameter("bias_F", bias_F)
        self.selector = Selector(len(weight_DF), column_norms(weight_DF) if weighted else None)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        """`(B, T, D)` to the output of each projection."""
        rows = self.rows.within(x_BTD.shape[1])
        pieces = (
            x_BTD[:, : rows.start] @ self.weight_DF,
            self._of_kept(x_BTD[:, rows]),
            x_BTD[:, rows.stop :] @ self.weight_DF,
        )
        pieces = [y_BTF for y_BTF in pieces if y_BTF.shape[1]]
        y_BTF = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        if self.bias_F is not None:
            y_BTF = y_BTF + self.bias_F
        return y_BTF.split(self.sizes, dim=-1)

    def _of_kept(self, x_BTD: Tensor) -> Tensor:
        x_RD = x_BTD.flatten(0, 1).contiguous()
        return linear_of_kept(x_RD, self.selector, self.weight_DF).unflatten(0, x_BTD.shape[:2])
