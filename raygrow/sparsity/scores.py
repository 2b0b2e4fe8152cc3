"""How large the scores of an input's entries are, added up batch by batch."""

import torch
from torch import Tensor

from raygrow.kernels.group_select import group_sizes, ranked

LOWEST, HIGHEST, PER_OCTAVE = -40, 24, 64
"""Powers of two between which sizes are told apart, and how finely."""

_BINS = (HIGHEST - LOWEST) * PER_OCTAVE


class Histogram:
    """Counts of the sizes seen so far, in logarithmic bins. A quantile is off by less than one, 1.1 % of its value."""

    def __init__(self) -> None:
        self._counts = torch.zeros(_BINS, dtype=torch.int64)

    def add(self, x: Tensor) -> None:
        """Counts the size of every entry.

        Raises:
            ValueError: If one is no finite number.
        """
        _check(x)
        octaves = x.detach().abs().to(torch.promote_types(x.dtype, torch.float32)).flatten().log2()
        bins = ((octaves - LOWEST) * PER_OCTAVE).clamp_(0, _BINS - 1).long()
        self._counts += torch.bincount(bins, minlength=_BINS).cpu()

    def quantile(self, share: float) -> float:
        """The size below which a share of the entries lies, of which there are some; 0 for a share of 0."""
        if share <= 0:
            return 0.0
        below = self._counts.cumsum(0).double()
        wanted = share * float(below[-1])
        bin = int(torch.searchsorted(below, wanted).clamp(max=_BINS - 1))
        count = int(self._counts[bin])
        inside = (wanted - (float(below[bin]) - count)) / max(count, 1)
        return 2.0 ** (LOWEST + (bin + inside) / PER_OCTAVE)


class RankedEnergy:
    """Squares of the largest, the second largest, ... score of each group of entries, summed over all tokens."""

    def __init__(self, size: int) -> None:
        self._size, self._energy_GN = size, torch.zeros(())

    def add(self, score_RD: Tensor) -> None:
        """Sums up the scores of some rows.

        Raises:
            ValueError: If one is no finite number.
        """
        _check(score_RD)
        self._energy_GN = self._energy_GN + ranked(score_RD).double().square().sum(0).cpu()

    def groups(self, keep: int) -> tuple[int, ...]:
        """How many entries of each group to keep, `keep` in all, so that least energy is lost."""
        energy_GN = self._energy_GN.clone()
        energy_GN[-1, group_sizes(self._size)[-1] :] = -1.0  # the last group may have less
        kept_N = energy_GN.flatten().argsort(descending=True, stable=True)[:keep]
        return tuple(torch.bincount(kept_N // energy_GN.shape[1], minlength=len(energy_GN)).tolist())


def _check(scores: Tensor) -> None:
    if not scores.isfinite().all():
        raise ValueError("the model's activations on the calibration text are no numbers: is it damaged?")
