"""Virtual memory of the host: a large private mapping whose pages exist from their first touch until they are dropped.

The counterpart of `device_memory.py` with the same interface. Reading a page that does not exist gives zeros here, not
a fault. Needs Linux.
"""

import mmap

import torch

PAGE_BYTES = 16 * mmap.PAGESIZE
"""A good size for most: larger wastes memory, smaller time."""
MAP_NORESERVE = 0x4000  # which the mmap module of Python 3.11 lacks


class HostMemory:
    """Reserves virtual memory that costs nothing until it is written to.

    Raises:
        ValueError: If `page_bytes` is not a multiple of the system's pages.
        MemoryError: If the system refuses to reserve that much.
    """

    maps_slowly = False
    """Whether mapping is worth doing ahead, in a thread."""
    spare_bytes = 0
    """Physical memory held beside what is mapped."""

    def __init__(self, nbytes: int, *, dtype: torch.dtype, page_bytes: int) -> None:
        if page_bytes % mmap.PAGESIZE:
            raise ValueError(f"page_bytes={page_bytes}: must be a multiple of {mmap.PAGESIZE}, the system's page")
        try:
            self._mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        except OSError as error:
            raise MemoryError(
                f"the system refuses to reserve {nbytes:,} bytes of virtual memory ({error.strerror}): "
                "use fewer slots or shorter sequences, or allow overcommit (vm.overcommit_memory=0 or 1, ulimit -v)"
            ) from error
        # a huge page would exist whole when one byte of it is touched: more memory than what was counted
        self._mapping.madvise(mmap.MADV_NOHUGEPAGE)
        self.flat = torch.frombuffer(self._mapping, dtype=dtype)
        """All of it, as a tensor of one dimension."""

    def create(self, pages: int) -> bool:
        """Whether so many more pages can be mapped: the system tells only when they are touched."""
        return True

    def take(self, pages: int) -> list[None]:
        """So many pages, to be mapped."""
        return [None] * pages

    def map(self, offset: int, pages: list[None]) -> None:
        """Makes consecutive pages usable. The system gives each one at its first touch."""

    def unmap(self, offset: int, nbytes: int) -> None:
        """Gives pages back at once; what is in them is lost."""
        self._mapping.madvise(mmap.MADV_DONTNEED, offset, nbytes)

    def fence(self) -> None:
        """Nothing runs behind the caller's back here."""

    def trim(self, pages: int) -> None:
        """Nothing is held beside the pages in use."""

    def close(self) -> None:
        """Gives all pages back. The address range goes with the last tensor in it."""
        self._mapping.madvise(mmap.MADV_DONTNEED)
