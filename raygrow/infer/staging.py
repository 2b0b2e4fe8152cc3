"""Numbers on their way to the device, which neither the host nor the device waits for.

A copy from ordinary memory of the host would wait for all that the device has been asked to do before.
"""

import contextlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ROWS = 3
"""Token, position and slot of each token of a step."""


class Staging:
    """Memory that the numbers of every step pass through: pinned once, and filled again when the device has read it.

    Args:
        columns: Tokens of the largest step.
        device: Where the numbers go.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self._host = torch.zeros(ROWS * columns, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = device
        self._read = torch.cuda.Event() if device.type == "cuda" else None

    def send(self, numbers: Sequence[Sequence[int]], fill: Sequence[int] = (), *, out: Tensor | None = None) -> Tensor:
        """Brings the numbers of a step to the device.

        Args:
            numbers: Of each token, in ROWS rows.
            fill: What stands in each row of `out` beyond them.
            out: `(ROWS, columns)`, contiguous, where to put them; new memory when not given. On a CPU the memory
                that is filled again.
        """
        if self._read is not None:
            self._read.synchronize()
        given = len(numbers[0])
        columns = given if out is None else out.shape[1]
        host_3T = self._host[: ROWS * columns].view(ROWS, columns)
        array = host_3T.numpy()
        array[:, :given] = numbers
        if columns > given:
            array[:, given:] = np.array(fill)[:, None]
        if self._read is None:
            return host_3T if out is None else out.copy_(host_3T)
        out = torch.empty_like(host_3T, device=self._device) if out is None else out
        out.copy_(host_3T, non_blocking=True)
        self._read.record(torch.cuda.current_stream(self._device))
        return out


class OnItsWay:
    """A tensor on its way to the host; the device may not have computed it yet.

    Args:
        tensor: Small. It may be overwritten as soon as this is made.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._host = tensor.to("cpu", non_blocking=True)  # from CUDA into pinned memory
        self._there = None
        if tensor.is_cuda:
            self._there = torch.cuda.Event()
            self._there.record(torch.cuda.current_stream(tensor.device))

    def tolist(self) -> list:
        """Its values, when they are there."""
        if self._there is not None:
            self._there.synchronize()
        return self._host.tolist()


def to_device(numbers: Sequence, device: torch.device, *, dtype: torch.dtype = torch.int64) -> Tensor:
    """A few numbers that not every step has."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes a CUDA device the one that kernels are started on; torch does that by itself only for its own."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
