"""Virtual memory of a CUDA device: addresses reserved once, physical pages mapped into them by the driver's calls.

The counterpart of `host_memory.py` with the same interface, with two differences: touching a page that is not mapped
is a fault that ends the process's use of the device, and every call takes tens of microseconds, so pages are created
and mapped ahead. Needs cuda-bindings, which come with CUDA builds of torch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from raygrow.infer.dlpack import tensor_at

try:
    from cuda.bindings import driver  # pyright: ignore[reportMissingImports]
except ImportError:  # told when it is used: everything here can be imported without a device
    driver: Any = None


class DeviceMemory:
    """Reserves addresses on a device, of which whole pages can be made real.

    Several threads may create, take and map pages at once, each its own.

    Raises:
        ValueError: If `page_bytes` is not a multiple of the driver's granularity.
        RuntimeError: If a driver call fails.
    """

    maps_slowly = True
    """Whether mapping is worth doing ahead, in a thread."""

    def __init__(self, nbytes: int, *, dtype: torch.dtype, device: torch.device, page_bytes: int) -> None:
        granularity = smallest_page(device)
        if page_bytes % granularity:
            raise ValueError(f"page_bytes={page_bytes}: must be a multiple of {granularity}, the device's page")
        self._page_bytes, self._nbytes, self._device = page_bytes, nbytes, device
        self._properties = _properties(device)
        self._access = driver.CUmemAccessDesc()
        self._access.location = self._properties.location
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._context = primary_context(device)
        self._created: list[Any] = []
        """Physical pages that are not mapped."""
        self._mapped: dict[int, Any] = {}
        """Physical pages, by the offset that they are mapped to."""
        with self._entered():
            self._address = int(_check(driver.cuMemAddressReserve(nbytes, 0, 0, 0)))
        self._closed = False
        self.flat = tensor_at(self._address, nbytes // dtype.itemsize, dtype=dtype, device=device)
        """All of it, as a tensor of one dimension."""

    @property
    def spare_bytes(self) -> int:
        """Physical memory held beside what is mapped."""
        return len(self._created) * self._page_bytes

    def create(self, pages: int) -> bool:
        """Makes sure that so many pages can be taken at once; False if the device has not so much memory left."""
        with self._entered():
            while len(self._created) < pages:
                page = self._new_page()
                if page is None:
                    return False
                self._created.append(page)
        return True

    def take(self, pages: int) -> list[Any] | None:
        """So many pages, to be mapped; None if the device has not so much memory left."""
        taken: list[Any] = []
        with self._entered():
            while len(taken) < pages:
                page = self._created_page()
                page = self._new_page() if page is None else page
                if page is None:
                    self._created += taken
                    return None
                taken.append(page)
        return taken

    def map(self, offset: int, pages: list[Any]) -> None:
        """Makes consecutive pages usable, whose physical ones were taken before; what is in them is arbitrary."""
        with self._entered():
            for number, page in enumerate(pages):
                at = offset + number * self._page_bytes
                _check(driver.cuMemMap(self._address + at, self._page_bytes, 0, page, 0))
                self._mapped[at] = page
            # by far the slowest of these calls, so it is made once for all of them
            nbytes = len(pages) * self._page_bytes
            _check(driver.cuMemSetAccess(self._address + offset, nbytes, [self._access], 1))

    def unmap(self, offset: int, nbytes: int) -> None:
        """Takes pages back, for others to use; nothing on the device may touch them any more."""
        with self._entered():
            for at in range(offset, offset + nbytes, self._page_bytes):
                # page by page: a mapping cannot be undone in part, and pages come and go in runs of other lengths
                _check(driver.cuMemUnmap(self._address + at, self._page_bytes))
                self._created.append(self._mapped.pop(at))

    def fence(self) -> torch.cuda.Event:
        """What the calling thread has asked the device to do so far, to be waited for before pages are unmapped."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def trim(self, pages: int) -> None:
        """Gives pages that are not mapped back to the device, but for a number of them."""
        with self._entered():
            while len(self._created) > pages and (page := self._created_page()) is not None:
                _check(driver.cuMemRelease(page))

    def close(self) -> None:
        """Gives everything back, once the device has done its work. The tensors must not be touched any more."""
        if self._closed:
            return
        self._closed = True
        wait_for_device(self._device)
        for offset in list(self._mapped):
            self.unmap(offset, self._page_bytes)
        self.trim(0)
        with self._entered():
            _check(driver.cuMemAddressFree(self._address, self._nbytes))

    def _new_page(self) -> Any | None:
        result, page = driver.cuMemCreate(self._page_bytes, self._properties, 0)
        return None if result == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY else _check((result, page))

    def _created_page(self) -> Any | None:
        try:
            return self._created.pop()
        except IndexError:  # another thread may have taken the last one
            return None

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """Makes torch's context of the device current in this thread, and then again the one that was."""
        _check(driver.cuCtxPushCurrent(self._context))
        try:
            yield
        finally:
            _check(driver.cuCtxPopCurrent())


def smallest_page(device: torch.device) -> int:
    """The driver's granularity in bytes: 2 MiB on all GPUs so far.

    Raises:
        ModuleNotFoundError: If cuda-bindings are missing.
    """
    if driver is None:
        raise ModuleNotFoundError(
            "the key-value cache on CUDA needs cuda-bindings: pip install cuda-bindings, of torch's CUDA version"
        )
    primary_context(device)
    minimum = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    return int(_check(driver.cuMemGetAllocationGranularity(_properties(device), minimum)))


def primary_context(device: torch.device) -> Any:
    """Torch's own context of a device. Memory that is mapped in another one is out of torch's reach."""
    with torch.cuda.device(device):
        torch.empty(1, device=device)  # torch makes its context when it first needs it
        return _check(driver.cuCtxGetCurrent())


def wait_for_device(device: torch.device) -> None:
    """Until everything that it was asked to do is done."""
    torch.cuda.synchronize(device)


def _properties(device: torch.device) -> Any:
    properties = driver.CUmemAllocationProp()
    properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = device.index
    properties.win32HandleMetaData = 0  # not None, of which some versions make a wild pointer
    return properties


def _check(returned: tuple) -> Any:
    """What a driver call returned beside its status.

    Raises:
        RuntimeError: If the status is an error.
    """
    status, *values = returned
    if status != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(status)
        raise RuntimeError(f"CUDA driver: {status.name}: {text.decode() if text else 'unknown error'}")
    return values[0] if values else None
