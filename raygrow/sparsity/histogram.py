"""How large the scores of an input's entries are: counts in logarithmic bins, added up batch by batch."""

import torch
from torch import Tensor

LOWEST, HIGHEST, PER_OCTAVE = -40, 24, 64
"""Powers of two between which sizes are told apart, and how finely."""

_BINS = (HIGHEST - LOWEST) * PER_OCTAVE


class Histogram:
    """Sizes seen so far. A quantile of them is off by less than one bin, 1.1 % of its value."""

    def __init__(self) -> None:
        self._counts = torch.zeros(_BINS, dtype=torch.int64)

    def add(self, x: Tensor) -> None:
        """Counts the size of every entry.

        Raises:
            ValueError: If one is no finite number.
        """
        if not x.isfinite().all():
            raise ValueError("the model's activations on the calibration text are no numbers: is it damaged?")
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
