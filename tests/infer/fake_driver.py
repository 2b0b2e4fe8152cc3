"""The driver's calls on a stretch of host memory: strict about the order of calls, and pages lose what was in them."""

import ctypes
import mmap
import threading
import time
from enum import Enum
from types import SimpleNamespace

import pytest
import torch

from raygrow.infer import device_memory, kv_cache
from raygrow.infer.device_memory import DeviceMemory

PAGE = mmap.PAGESIZE


class Result(Enum):
    """Of a call."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2


class FakeDriver:
    """Stands in for `cuda.bindings.driver`. Breaking a rule of the real one raises AssertionError."""

    CUresult = Result
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)

    def __init__(self, most_pages: int) -> None:
        self.most_pages = most_pages
        self.handles: set[int] = set()
        self.mapped: dict[int, int] = {}
        self.accessible: set[int] = set()
        self.calls: list[str] = []
        self.reserved: mmap.mmap | None = None
        self._next = 1
        self._contexts = threading.local()

    def CUmemAllocationProp(self) -> SimpleNamespace:
        return SimpleNamespace(location=SimpleNamespace())

    def CUmemAccessDesc(self) -> SimpleNamespace:
        return SimpleNamespace()

    def cuCtxPushCurrent(self, context: object) -> tuple:
        self._contexts.stack = [*self.contexts, context]
        return (Result.CUDA_SUCCESS,)

    def cuCtxPopCurrent(self) -> tuple:
        *self._contexts.stack, last = self.contexts
        return Result.CUDA_SUCCESS, last

    @property
    def contexts(self) -> list[object]:
        """Of this thread; the last one is current."""
        return getattr(self._contexts, "stack", [])

    def _enter(self, call: str | None = None) -> None:
        assert self.contexts[-1:] == ["torch's"], "a call in the context of another device, or of none"
        if call:
            self.calls.append(call)
        time.sleep(0)  # as the real one, it lets other threads go on

    def cuMemGetAllocationGranularity(self, properties: SimpleNamespace, flag: int) -> tuple:
        return Result.CUDA_SUCCESS, PAGE

    def cuMemAddressReserve(self, nbytes: int, alignment: int, address: int, flags: int) -> tuple:
        self._enter()
        self.reserved = mmap.mmap(-1, nbytes)
        return Result.CUDA_SUCCESS, ctypes.addressof(ctypes.c_char.from_buffer(self.reserved))

    def cuMemAddressFree(self, address: int, nbytes: int) -> tuple:
        self._enter()
        assert not self.mapped
        return (Result.CUDA_SUCCESS,)

    def cuMemCreate(self, nbytes: int, properties: SimpleNamespace, flags: int) -> tuple:
        assert nbytes == PAGE
        assert properties.win32HandleMetaData == 0
        self._enter("create")
        if len(self.handles) >= self.most_pages:
            return Result.CUDA_ERROR_OUT_OF_MEMORY, None
        self._next += 1
        self.handles.add(self._next)
        return Result.CUDA_SUCCESS, self._next

    def cuMemRelease(self, handle: int) -> tuple:
        assert handle not in self.mapped.values()
        self.handles.remove(handle)
        self._enter("release")
        return (Result.CUDA_SUCCESS,)

    def cuMemMap(self, address: int, nbytes: int, offset: int, handle: int, flags: int) -> tuple:
        assert nbytes == PAGE
        assert address not in self.mapped, "an address is mapped twice"
        assert handle in self.handles
        assert handle not in self.mapped.values(), "a page is mapped twice"
        self.mapped[address] = handle
        ctypes.memset(address, 0xFF, nbytes)  # NaN
        self._enter("map")
        return (Result.CUDA_SUCCESS,)

    def cuMemSetAccess(self, address: int, nbytes: int, access: list, count: int) -> tuple:
        assert (access[0].flags, count) == (3, 1)
        pages = range(address, address + nbytes, PAGE)
        assert all(page in self.mapped for page in pages)
        self.accessible.update(pages)
        self._enter("set_access")
        return (Result.CUDA_SUCCESS,)

    def cuMemUnmap(self, address: int, nbytes: int) -> tuple:
        assert nbytes == PAGE
        del self.mapped[address]
        self.accessible.remove(address)
        ctypes.memset(address, 0xFF, nbytes)
        self._enter("unmap")
        return (Result.CUDA_SUCCESS,)

    def cuGetErrorString(self, status: Result) -> tuple:
        return Result.CUDA_SUCCESS, status.name.encode()


def use(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes caches on the CPU take their memory from a fake driver, and write its fences into its calls."""
    fence = SimpleNamespace(synchronize=lambda: driver.calls.append("wait"))
    monkeypatch.setattr(device_memory, "driver", driver)
    monkeypatch.setattr(device_memory, "primary_context", lambda device: "torch's")
    monkeypatch.setattr(device_memory, "wait_for_device", lambda device: None)
    monkeypatch.setattr(DeviceMemory, "fence", lambda memory: fence)

    def reserve(nbytes: int, dtype: torch.dtype, device: torch.device, page_bytes: int) -> DeviceMemory:
        return DeviceMemory(nbytes, dtype=dtype, device=device, page_bytes=page_bytes)

    monkeypatch.setattr(kv_cache, "reserve", reserve)
