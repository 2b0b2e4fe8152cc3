"""Virtual memory of whichever device a cache lives on."""

from typing import Any, Protocol

import torch
from torch import Tensor

from raygrow.infer.device_memory import DeviceMemory, smallest_page
from raygrow.infer.host_memory import PAGE_BYTES, HostMemory


class Memory(Protocol):
    """A reserved range of addresses, of which any whole pages can be made real and given back.

    One thread may take and map pages while another does: not the same ones.
    """

    flat: Tensor
    maps_slowly: bool

    @property
    def spare_bytes(self) -> int: ...
    def create(self, pages: int) -> bool: ...
    def take(self, pages: int) -> list[Any] | None: ...
    def map(self, offset: int, pages: list[Any]) -> None: ...
    def unmap(self, offset: int, nbytes: int) -> None: ...
    def fence(self) -> Any: ...
    def trim(self, pages: int) -> None: ...
    def close(self) -> None: ...


def whole(device: torch.device) -> torch.device:
    """A device with its index."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def default_page(device: torch.device) -> int:
    """Bytes of a page that suit most."""
    return smallest_page(device) if device.type == "cuda" else PAGE_BYTES


def reserve(nbytes: int, dtype: torch.dtype, device: torch.device, page_bytes: int) -> Memory:
    """Addresses on a device."""
    if device.type == "cuda":
        return DeviceMemory(nbytes, dtype=dtype, device=device, page_bytes=page_bytes)
    return HostMemory(nbytes, dtype=dtype, page_bytes=page_bytes)
