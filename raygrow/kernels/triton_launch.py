"""What launches of Triton kernels share: overlapping with the kernel before, and tickets.

A ticket counts the programs of a kernel that have written their part of a result; who draws the last one puts the parts
together. It is zero between launches.
"""

import torch
from torch import Tensor


def overlaps(device: torch.device) -> bool:
    """Whether a kernel can be launched before the one it depends on has ended (from Hopper on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def overlapping(pdl: bool) -> dict[str, bool]:
    """How a kernel is launched that calls `gdc_wait` where `pdl`."""
    return {"launch_pdl": True} if pdl else {}


_tickets: dict[tuple[torch.device, int, int], Tensor] = {}


def tickets_of(owner: Tensor, count: int) -> Tensor:
    """A tensor's own tickets, since kernels that work on others may run at the same time.

    They are never given back: CUDA graphs hold on to them.

    Raises:
        RuntimeError: If a CUDA graph is being recorded and they are not there yet: they would be its own.
    """
    key = owner.device, owner.data_ptr(), count
    if key not in _tickets:
        if owner.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a kernel with tickets must run once before it is captured in a CUDA graph")
        _tickets[key] = torch.zeros(count, dtype=torch.int32, device=owner.device)
    return _tickets[key]
