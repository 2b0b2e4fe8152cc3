"""The one place that makes linear projections, so that other kinds of weight can be put in their place."""

import torch
from torch import Tensor, nn

from raygrow.kernels.grouped_mm import grouped_mm


def linear(d_in: int, d_out: int, *, bias: bool = False) -> nn.Linear:
    """A projection from `d_in` to `d_out`; its weight is `(d_out, d_in)`. `nn/init.py` fills it."""
    return nn.Linear(d_in, d_out, bias=bias)


def constant(value: Tensor) -> nn.Parameter:
    """A weight that does not train."""
    return nn.Parameter(value.detach(), requires_grad=False)


class GroupedLinear(nn.Module):
    """A projection of every expert, stacked: weight `(E, d_out, d_in)`, bias `(E, d_out)`. `nn/init.py` fills them."""

    bias: nn.Parameter | None

    def __init__(self, n_experts: int, d_in: int, d_out: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, d_out, d_in))
        self.register_parameter("bias", nn.Parameter(torch.empty(n_experts, d_out)) if bias else None)

    def forward(self, x_SD: Tensor, offsets_E: Tensor) -> Tensor:
        """Each row by its expert's projection; `offsets_E` is where the rows of each expert end."""
        return grouped_mm(x_SD, self.weight, offsets_E, self.bias)
