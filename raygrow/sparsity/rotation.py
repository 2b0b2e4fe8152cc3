"""Bases of the residual stream in which its energy lies in few entries (LaRoSA, arXiv 2507.01299).

A basis is an orthogonal matrix Q: what was x is x Q in it. Shapes: D model.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from raygrow.nn.config import ModelConfig
from raygrow.sparsity.calibrate import Moments
from raygrow.sparsity.inputs import ROTATED


def principal_basis(moment_DD: Tensor) -> Tensor:
    """The eigenvectors of a second moment, `(D, D)` in fp64, those of most energy first.

    Nothing is added to its diagonal: that would turn no eigenvector. Directions without any energy come last, at right
    angles to all others as they are.

    Args:
        moment_DD: Symmetric, fp64.

    Raises:
        ValueError: If it holds what is no number.
    """
    if not moment_DD.isfinite().all():
        raise ValueError("the model's activations on the calibration text are no numbers: is it damaged?")
    return torch.linalg.eigh(moment_DD).eigenvectors.flip(1)


def block_bases(moments: Iterable[Moments], device: torch.device) -> list[Tensor]:
    """A basis for each Block, on the CPU: of what its attention and its MLP read, which share the residual stream."""
    return [principal_basis(_moment(block).to(device)).cpu() for block in moments]


def global_basis(moments: Iterable[Moments], config: ModelConfig, device: torch.device) -> list[Tensor]:
    """One basis for the whole model, once per Block: of what all of its Blocks read."""
    total_DD = None
    for block in moments:
        total_DD = _moment(block) if total_DD is None else total_DD + _moment(block)
    assert total_DD is not None, "a model has Blocks"
    return [principal_basis(total_DD.to(device)).cpu()] * config.n_blocks


def _moment(block: Moments) -> Tensor:
    return torch.stack([block[name] for name in ROTATED]).sum(0)
