"""A mixture of experts that reads only the weights of the entries that are kept.

Shapes: B batch, T tokens, N = B x T, R rows, K experts of a row or token, S = N x K slots (pairs of a token and one of
its experts), D model, F hidden, G what is read of `mlp` (gate and up side by side), E experts.
"""

from typing import Any

import torch
from torch import Tensor, nn

from raygrow.kernels.grouped_mm import grouped_mm
from raygrow.kernels.sparse_linear import Selection, select, sparse_expert_linear
from raygrow.kernels.threshold_linear import threshold_expert_linear
from raygrow.nn.linear import constant
from raygrow.nn.mlp import fusible, readers
from raygrow.nn.moe import Moe
from raygrow.sparsity.linear import SparseRows, only_kept
from raygrow.sparsity.methods import Choice, Selector, column_norms


class SparseMoe(nn.Module):
    """A norm, experts and the residual stream around both.

    The experts of a token share what is kept of their input; of what `down` reads each keeps its own. The router reads
    everything. While no more slots than experts are asked for, all tokens are sparse and nothing is chosen by groups,
    each slot reads what it keeps of its expert; else experts are read whole, by all of their tokens together.

    Args:
        moe: It loses its experts, which are here from now on, input-major.
        norm: Of the input.
        rows: Which tokens are sparse.
        weighted: Whether scores are weighted by the norms of columns.
    """

    def __init__(self, moe: Moe, norm: nn.Module, rows: SparseRows, *, weighted: bool) -> None:
        super().__init__()
        self.moe, self.norm, self.rows = moe, norm, rows
        experts: Any = moe.experts
        del moe.experts  # there is no room for two copies
        self.activate, self.gated, reading = experts.activate, fusible(experts), readers(experts)
        self.parts = len(reading)
        self.up_EDG = constant(torch.cat([p.weight.detach() for p in reading], 1).transpose(1, 2).contiguous())
        self.down_EFD = constant(experts.down.weight.detach().transpose(1, 2).contiguous())
        biased = experts.up.bias is not None
        self.up_bias_EG = constant(torch.cat([p.bias.detach() for p in reading], 1)) if biased else None
        self.down_bias_ED = experts.down.bias
        # an entry of the input is one thing for all experts; hidden units of theirs have nothing to do with each other
        scale_D = column_norms(self.up_EDG.transpose(0, 1).flatten(1)) if weighted else None
        device = self.up_EDG.device
        self.selectors = (
            Selector(self.up_EDG.shape[1], device, scale_D),
            Selector(self.down_EFD.shape[1], device),
        )
        self.scale_EF = column_norms(self.down_EFD) if weighted else None

    def forward(self, x_BTD: Tensor, residual_BTD: Tensor) -> Tensor:
        """The residual stream plus what the experts make of `x`."""
        x_BTD = self.norm(x_BTD)
        rows = self.rows.within(x_BTD.shape[1])
        slots = x_BTD.shape[0] * x_BTD.shape[1] * self.moe.top_k
        together = any(selector.groups or selector.watched for selector in self.selectors)
        alone = not together and rows == slice(0, x_BTD.shape[1]) and slots <= len(self.up_EDG)
        y_ND = self._slot_by_slot(x_BTD) if alone else self._expert_by_expert(x_BTD, rows)
        return residual_BTD + y_ND.to(x_BTD.dtype).view_as(x_BTD)

    def _slot_by_slot(self, x_BTD: Tensor) -> Tensor:
        """Each slot with its own rows of its expert's weights. On CUDA nothing waits for the device."""
        of_x, of_hidden = self.selectors
        _, weights_BTK, experts_BTK = self.moe.choose(x_BTD)
        x_ND, expert_NK = x_BTD.flatten(0, 1).contiguous(), experts_BTK.flatten(0, 1)
        hidden_SF = kept_expert_linear(
            x_ND, of_x.choice, of_x.scale_D, self.up_EDG, expert_NK, self.up_bias_EG, gated=self.gated
        )
        if not self.gated:
            hidden_SF = self.activate(*hidden_SF.chunk(self.parts, dim=1)).contiguous()
        expert_S = expert_NK.flatten()
        y_SD = kept_expert_linear(
            hidden_SF, of_hidden.choice, self._scale(expert_S), self.down_EFD, expert_S[:, None], self.down_bias_ED
        )
        return (y_SD.unflatten(0, expert_NK.shape) * weights_BTK.flatten(0, 1)[..., None]).sum(1)

    def _expert_by_expert(self, x_BTD: Tensor, rows: slice) -> Tensor:
        """Slots sorted by expert, by grouped products."""
        of_x, of_hidden = self.selectors
        routes = self.moe.route(x_BTD)
        x_SD = only_kept(x_BTD, rows, of_x).flatten(0, 1)[routes.tokens_S]
        up_SG = grouped_mm(x_SD, self.up_EDG.transpose(1, 2), routes.offsets_E, self.up_bias_EG)
        hidden_SF = self.activate(*up_SG.chunk(self.parts, dim=1)).contiguous()
        if of_hidden.drops and rows.start < rows.stop:
            sparse_BT = torch.zeros(x_BTD.shape[:2], dtype=torch.bool, device=x_BTD.device)
            sparse_BT[:, rows] = True
            sparse_S1 = sparse_BT.flatten()[routes.tokens_S, None]
            slot_S = torch.arange(len(hidden_SF), dtype=routes.offsets_E.dtype, device=hidden_SF.device)
            scale_SF = self._scale(torch.searchsorted(routes.offsets_E, slot_S, right=True))
            hidden_SF = torch.where(sparse_S1, of_hidden.masked(hidden_SF, scale_SF), hidden_SF)
        return routes.combine(grouped_mm(hidden_SF, self.down_EFD.transpose(1, 2), routes.offsets_E, self.down_bias_ED))

    def _scale(self, expert_S: Tensor) -> Tensor | None:
        """What the scores of each slot's hidden units are weighted by, `(S, F)`."""
        return None if self.scale_EF is None else self.scale_EF[expert_S]


def kept_expert_linear(
    x_RD: Tensor,
    choice: Choice,
    scale: Tensor | None,
    weight_EDF: Tensor,
    expert_RK: Tensor,
    bias_EF: Tensor | None,
    *,
    gated: bool = False,
) -> Tensor:
    """What rows keep, times the weights of each of their experts, `(R x K, F)`. What is kept is chosen once for a row.

    Arguments are those of `threshold_expert_linear`, but for the experts, of which a row has K.
    """
    expert_S, k = expert_RK.flatten(), expert_RK.shape[1]
    if choice.threshold is not None:
        x_SD = x_RD.repeat_interleave(k, 0)
        return threshold_expert_linear(x_SD, weight_EDF, expert_S, choice.threshold, scale, bias_EF, gated=gated)
    kept = Selection(*(part.repeat_interleave(k, 0) for part in select(x_RD, choice.keep, scale)))
    return sparse_expert_linear(kept, weight_EDF, expert_S, bias_EF, gated=gated)
