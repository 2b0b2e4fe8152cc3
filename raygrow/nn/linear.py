"""The one place that makes linear projections, so that other kinds of weight can be put in their place."""

from torch import nn


def linear(d_in: int, d_out: int, *, bias: bool = False) -> nn.Linear:
    """A projection from `d_in` to `d_out`; its weight is `(d_out, d_in)`. `nn/init.py` fills it."""
    return nn.Linear(d_in, d_out, bias=bias)
