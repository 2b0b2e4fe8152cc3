"""Random numbers that growth puts into tensors.

They are drawn on the CPU in fp32, from a seed and a key such as the name of the tensor. So a fill gives the same for a
model in memory, for a folder, and on any number of workers. Meta tensors stay what they are: shapes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from raygrow.nn.init import seed_of

_PART = 2**20


@dataclass(frozen=True)
class Fresh:
    """A new tensor from N(0, std)."""

    shape: tuple[int, ...]
    std: float
    like: str
    """A small source tensor, whose dtype and device the new one takes."""
    key: str
    seed: int

    def apply(self, value: Tensor | None, sources: Mapping[str, Tensor]) -> Tensor:
        assert value is None, "a fresh tensor replaces nothing"
        like = sources[self.like]
        if like.is_meta:
            return like.new_empty(self.shape)
        return (_normal(self.shape, self.key, self.seed) * self.std).to(like)


@dataclass(frozen=True)
class NoisePairs:
    """+N on one copy of the columns and -N on the next, so that inputs that are equal copies cancel it.

    A matrix `[W W W]` of three copies becomes `[W+N W-N W]`. N is drawn for every row, so copies of a row differ.
    """

    copies: int
    """Equal copies along the last axis."""
    snr_db: float
    """How far the noise is below the matrix: its standard deviation is `10^(-snr_db / 20)` of the matrix's."""
    key: str
    seed: int

    def apply(self, value: Tensor | None, sources: Mapping[str, Tensor]) -> Tensor:
        assert value is not None, "noise needs something to be added to"
        if value.is_meta:
            return value
        pairs = self.copies // 2
        noisy = value.clone().unflatten(-1, (self.copies, -1))
        noise = _normal((*value.shape[:-1], pairs, noisy.shape[-1]), self.key, self.seed).to(value.device)
        noise *= mean_and_std(value)[1] * 10 ** (-self.snr_db / 20)
        noisy[..., 0 : 2 * pairs : 2, :] += noise
        noisy[..., 1 : 2 * pairs : 2, :] -= noise
        return noisy.flatten(-2)


@dataclass(frozen=True)
class Redraw:
    """A share of the slices along one axis drawn anew, from N(mean, std) of what they replace (arXiv 2502.19261)."""

    axis: int
    share: float
    """Above 0 and at most 1; at least one slice is drawn."""
    slices_key: str
    """Decides which slices, so that the matrices around one hidden unit can agree on it."""
    key: str
    seed: int

    def apply(self, value: Tensor | None, sources: Mapping[str, Tensor]) -> Tensor:
        assert value is not None, "a redraw replaces something"
        if value.is_meta:
            return value
        size = value.shape[self.axis]
        order = torch.randperm(size, generator=_generator(self.slices_key, self.seed))
        slices = order[: max(1, round(self.share * size))].to(value.device)
        mean, std = mean_and_std(value.index_select(self.axis, slices))
        shape = list(value.shape)
        shape[self.axis] = len(slices)
        return value.index_copy(self.axis, slices, (_normal(shape, self.key, self.seed) * std + mean).to(value))


def mean_and_std(value: Tensor) -> tuple[float, float]:
    """Mean and standard deviation over all elements, in fp64 and so the same for any number of threads."""
    # in parts: a copy of a large tensor in fp64 would be the largest thing in memory
    parts = (part.double() for part in value.flatten().split(_PART))
    total, squares = torch.stack([torch.stack((part.sum(), part.square().sum())) for part in parts]).sum(0).tolist()
    mean = total / value.numel()
    return mean, math.sqrt(max(squares / value.numel() - mean**2, 0.0))


def _generator(key: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(key, seed))


def _normal(shape: tuple[int, ...] | list[int], key: str, seed: int) -> Tensor:
    return torch.empty(shape).normal_(generator=_generator(key, seed))
