"""MLPs that leave out the hidden units that are exactly zero: method `relu`, of models whose MLP is rectified.

Nothing is dropped that counts, so it is for all tokens alike: what a model computes stays the same up to rounding. A
few tokens leave out what none of them uses; many together use nearly everything, and are computed densely.

Shapes: B batch, T tokens, R = B x T rows, D model, F hidden units.
"""

from typing import Any

from torch import Tensor, nn

from raygrow.kernels.zeros import nonzero_linear, rectified_linear
from raygrow.nn.block import Block
from raygrow.nn.mlp import RECTIFIED
from raygrow.nn.rack import Rack


def skip_zeros(model: Rack) -> Rack:
    """Makes the MLPs of a model leave out hidden units at zero, in place; those of other kinds and experts stay.

    Args:
        model: On the device and in the dtype that it runs in.

    Returns:
        The same model.

    Raises:
        ValueError: If the model is sparse or joined already.
    """
    block: Any
    for block in model.blocks:
        if not isinstance(block, Block):
            raise ValueError("this model is sparse or joined already: load it again")
        if isinstance(block.mlp, RECTIFIED):
            block.mlp = ZeroSkippingMlp(block.mlp)
    return model


class ZeroSkippingMlp(nn.Module):
    """A rectified MLP that reads the weights of the hidden units that are in use.

    A gate, or the one projection of a plain MLP, says which are: it is read whole. What else a unit has is a row of
    `up` and one of `down`, which is kept input-major.
    """

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.activate, self.up = mlp.activate, mlp.up
        self.gate = getattr(mlp, "gate", None)
        self.down_FD = nn.Parameter(mlp.down.weight.detach().T.contiguous(), requires_grad=False)
        self.down_bias_D = mlp.down.bias

    def forward(self, x_BTD: Tensor) -> Tensor:
        """`(B, T, D)` in and out."""
        x_RD = x_BTD.flatten(0, -2).contiguous()
        if self.gate is None:
            hidden_RF = self.activate(self.up(x_RD))
        else:
            hidden_RF = rectified_linear(self.gate(x_RD), x_RD, self.up.weight, self.up.bias)
        return nonzero_linear(hidden_RF, self.down_FD, self.down_bias_D).view_as(x_BTD)
