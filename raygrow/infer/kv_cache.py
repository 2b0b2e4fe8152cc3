"""Keys and values of all sequences, in contiguous virtual tensors whose memory comes and goes page by page.

Every sequence has a slot: a row of each tensor, long enough for the longest sequence. Only the pages that its tokens
have reached are real (vAttention, arXiv 2405.04437), so attention reads plain contiguous tensors and memory follows the
tokens. Here is the policy and the accounting; the pages come from `host_memory` or `device_memory`.

All tensors grow alike: page p of a slot is mapped in all of them or in none. So the accounting counts *strips*, page p
of one slot in every tensor, and a row's state is a number. Where they lie is told by `kv_layout`.
"""

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from raygrow.infer.kv_layout import KvLayout, Layout
from raygrow.infer.memory import default_page, reserve, whole
from raygrow.nn.config import ModelConfig

logger = logging.getLogger(__name__)

SPARE_STRIPS = 2
"""Physical memory that a device keeps created ahead, for sequences that need a page at once."""

SECONDS_WITHOUT = 1.0
"""Until a device that had less memory than the budget is asked again."""


class KvUsage(NamedTuple):
    """What the cache holds. `mapped_bytes` is `used_bytes` + `reclaimable_bytes`, and never above the budget."""

    used_bytes: int
    """Pages that running sequences have reached, and the scratch slot's."""
    mapped_bytes: int
    reclaimable_bytes: int
    """Pages of ended sequences, and those mapped ahead: taken back when memory is short, or by `reclaim`."""
    budget_bytes: int
    maps: int
    """Pages mapped so far, over all tensors."""
    unmaps: int
    spare_bytes: int
    """Physical memory created ahead and not mapped; within the budget too."""


@dataclass(eq=False)
class _Row:
    """One slot."""

    index: int
    busy: bool = False
    tokens: int = 0
    """Busy: those promised to its sequence. Ended: those that can still be read."""
    reach: int = 0
    """Busy: tokens that the pages promised to its sequence hold."""
    found: int = 0
    """Tokens of the ended sequence that were there when the busy one took the slot over."""
    pages: int = 0
    """Mapped, from the row's beginning, in every tensor."""
    ended: int = 0
    """When its sequence ended, as a running number."""
    fence: Any = None
    """Work on the device that may still read what the ended sequence left."""


class KvCache:
    """The cache of a model. One thread uses it; mapping ahead may run in a thread of the cache's own.

    Args:
        config: The model.
        slots: Sequences at a time.
        max_tokens: Of one sequence.
        dtype: Of keys and values.
        device: Where they live.
        budget_bytes: Physical memory that is never exceeded.
        layout: See `Layout`.
        page_bytes: Smallest piece of memory; the device's own when not given.

    Raises:
        ValueError: If the budget has no room for the scratch slot and a sequence's first page.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        slots: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str,
        budget_bytes: int,
        layout: Layout = "block",
        page_bytes: int | None = None,
    ) -> None:
        self.scratch = slots
        """A slot for rows without a sequence, such as those that fill up a CUDA graph: its first token can always be
        written and read."""
        self.max_tokens = max_tokens
        device = whole(torch.device(device))
        page = page_bytes or default_page(device)
        self._layout = KvLayout(
            config, rows=slots + 1, max_tokens=max_tokens, dtype=dtype, layout=layout, page_bytes=page
        )
        self._budget_bytes = budget_bytes
        self._limit = self._most = budget_bytes // self._layout.strip_bytes
        self._ask_again, self._warned = 0.0, False
        """When to, if the device has less than the budget; and whether that has been said."""
        self._mapped = self._maps = self._unmaps = self._clock = 0
        self._coming = 0
        """Strips that are being created and mapped without holding the lock."""
        self._coming_to: _Row | None = None
        self._lock = threading.Condition(threading.Lock())
        self._rows = [_Row(index) for index in range(slots + 1)]
        needed = 2 * self._layout.pages(1)
        if self._limit < needed:
            raise ValueError(
                f"budget_bytes={budget_bytes:,}: the KV cache of this model needs at least "
                f"{needed * self._layout.strip_bytes:,} ({self._layout.tensors} tensors, pages of {page:,} bytes)"
            )
        self._memory = reserve(self._layout.nbytes, dtype, device, page)
        self._mapper = ThreadPoolExecutor(1, "kv-cache") if self._memory.maps_slowly else None
        self._asked: set[int] = set()
        """Slots that pages are being mapped for, ahead."""
        self._failure: Exception | None = None
        self.k, self.v = self._layout.views(self._memory.flat)
        if not self.ensure(self.scratch, 1):
            raise MemoryError(f"the device has not even {self._layout.strip_bytes:,} bytes left for a KV cache")
        for tensor in (*self.k, *self.v):
            tensor[self.scratch, :1] = 0
        self._create_spare()

    @property
    def max_sequence_tokens(self) -> int:
        """Tokens of the longest sequence that the budget would hold if it were alone."""
        return min(self.max_tokens, self._layout.tokens(self._limit - self._layout.pages(1)))

    def ensure(self, slot: int, tokens: int) -> bool:
        """Makes positions below `tokens` of a slot usable; what the slot holds there stays.

        The slot is busy from then on. A slot that held an ended sequence is taken over; `found` tells what is there.

        Returns:
            False if the budget has no room even after taking back everything reclaimable; then nothing has changed.
        """
        if not 0 <= tokens <= self.max_tokens:
            raise ValueError(f"tokens={tokens}: a slot has positions for 0 to {self.max_tokens}")
        row = self._rows[slot]
        # pages promised to a running sequence are never taken, so this needs no lock
        if row.busy and tokens <= row.reach:
            row.tokens = max(row.tokens, tokens)
            return True
        pages = self._layout.pages(tokens)
        with self._lock:
            if self._failure is not None:
                raise RuntimeError("the KV cache could not map memory") from self._failure
            if not self._grow(row, pages):
                return False
            if not row.busy:
                row.found = min(row.tokens, tokens)
            row.busy, row.tokens, row.reach = True, tokens, self._layout.tokens(pages)
        return True

    def release(self, slot: int, keep_tokens: int = 0) -> None:
        """Ends a slot's sequence. Its pages stay mapped until memory is short or `reclaim` is called.

        Args:
            slot: A busy slot.
            keep_tokens: How many of its tokens are worth reading again; `held` tells how many still can be.
        """
        row = self._rows[slot]
        if not row.busy or slot == self.scratch:
            raise ValueError(f"slot {slot} has no sequence to release")
        with self._lock:
            self._clock += 1
            row.busy, row.tokens, row.ended = False, min(keep_tokens, row.tokens), self._clock
            row.fence = self._memory.fence()

    def held(self, slot: int) -> int:
        """Tokens of an ended sequence that can still be read in its slot, from the first on.

        Until the slot is taken over, mapping ahead for others may take some of them.
        """
        row = self._rows[slot]
        return 0 if row.busy else row.tokens

    def found(self, slot: int) -> int:
        """Tokens of the sequence before that a busy slot held when it was taken over, from the first on."""
        return self._rows[slot].found

    def copy(self, source: int, target: int, tokens: int) -> int:
        """Copies the first tokens of one slot to another, busy one. The source may have been taken back in part.

        Returns:
            How many tokens were copied.
        """
        with self._lock:
            row = self._rows[source]
            tokens = min(tokens, row.tokens)
            size = tokens * self._layout.token_bytes // self._memory.flat.itemsize
            rows = self._memory.flat.view(self._layout.tensors, len(self._rows), -1)
            rows[:, target, :size] = rows[:, source, :size]
            row.fence = self._memory.fence()
        return tokens

    def capacity(self, slot: int) -> int:
        """Tokens for which a slot's pages are mapped, in use or not."""
        return min(self.max_tokens, self._layout.tokens(self._rows[slot].pages))

    def map_ahead(self, slot: int, tokens: int) -> None:
        """Maps what `ensure(slot, tokens)` will need, at most one page per tensor ahead of what the slot has."""
        row = self._rows[slot]
        if tokens * self._layout.token_bytes <= row.pages * self._layout.page_bytes:  # nearly always
            return
        pages = min(self._layout.pages(min(tokens, self.max_tokens)), self._layout.pages(row.tokens) + 1)
        if not row.busy or pages <= row.pages or slot in self._asked:
            return
        if self._mapper is None:
            self._map_ahead(row, pages)
        else:
            self._asked.add(slot)
            self._mapper.submit(self._map_ahead, row, pages)

    def reclaim(self) -> int:
        """Gives back every page that no running sequence has reached. Returns their bytes."""
        with self._lock:
            self._lock.wait_for(lambda: not self._coming)
            before = self._mapped
            for row, pages in self._victims(None, urgent=True):
                self._shrink(row, pages)
            self._memory.trim(SPARE_STRIPS * self._layout.tensors)
            return (before - self._mapped) * self._layout.strip_bytes

    @property
    def usage(self) -> KvUsage:
        """Bytes and counts, now. It waits for no page that is being mapped ahead, and may count it late."""
        used, mapped = sum(self._layout.pages(row.tokens) for row in self._rows if row.busy), self._mapped
        return KvUsage(
            used_bytes=used * self._layout.strip_bytes,
            mapped_bytes=mapped * self._layout.strip_bytes,
            reclaimable_bytes=(mapped - used) * self._layout.strip_bytes,
            budget_bytes=self._budget_bytes,
            maps=self._maps * self._layout.tensors,
            unmaps=self._unmaps * self._layout.tensors,
            spare_bytes=self._memory.spare_bytes,
        )

    def close(self) -> None:
        """Gives everything back; the tensors must not be touched any more. Twice is as once."""
        if self._mapper is not None:
            self._mapper.shutdown(cancel_futures=True)
        with self._lock:
            self._memory.close()

    def _grow(self, row: _Row, pages: int) -> bool:
        """Maps a row's pages up to a number, taking others back if it must."""
        self._raise_limit()
        while (strips := pages - row.pages) > 0:
            if self._coming and (self._coming_to is row or self._short(strips) > 0):
                self._lock.wait_for(lambda: not self._coming)  # meanwhile the row may have lost pages, or got some
                continue
            if not self._make_room(strips, row, urgent=True):
                return False
            taken = self._memory.take(strips * self._layout.tensors)
            if taken is None:
                self._lower_limit()
                continue
            self._map(row, taken)
            self._count(row, strips)
        return True

    def _map(self, row: _Row, taken: list[Any]) -> None:
        """Maps physical pages behind those that a row has."""
        each = len(taken) // self._layout.tensors
        for number, offset in enumerate(self._layout.offsets(row.index, row.pages)):
            self._memory.map(offset, taken[number * each : (number + 1) * each])

    def _count(self, row: _Row, strips: int) -> None:
        row.pages += strips
        self._mapped += strips
        self._maps += strips

    def _raise_limit(self) -> None:
        """Counts on the whole budget again, after a while."""
        if self._limit < self._most and time.monotonic() >= self._ask_again:
            self._limit = self._most

    def _lower_limit(self) -> None:
        """Makes do with what the device has given so far."""
        self._limit = self._mapped + self._coming + self._memory.spare_bytes // self._layout.strip_bytes
        self._ask_again = time.monotonic() + SECONDS_WITHOUT
        if self._warned:
            return
        self._warned = True
        logger.warning(
            "the device has less memory than the KV cache's budget of %s bytes: %s have to do",
            f"{self._budget_bytes:,}",
            f"{self._limit * self._layout.strip_bytes:,}",
        )

    def _map_ahead(self, row: _Row, pages: int) -> None:
        try:
            self._grow_ahead(row, pages)
            self._create_spare()
        except Exception as error:  # of a thread that nobody waits for: told by the next `ensure`
            self._failure = error
        finally:
            self._asked.discard(row.index)

    def _grow_ahead(self, row: _Row, pages: int) -> None:
        """Maps a row's pages up to a number, if there is room for them."""
        with self._lock:
            strips = min(pages, self._layout.pages(row.tokens) + 1) - row.pages
            # its sequence may have ended since it was asked for
            if not row.busy or strips <= 0 or not self._make_room(strips, row, urgent=False):
                return
            with self._unlocked(strips, row):
                taken = self._memory.take(strips * self._layout.tensors)
                if taken is not None:
                    self._map(row, taken)
            if taken is None:
                self._lower_limit()
            else:
                self._count(row, strips)

    def _create_spare(self) -> None:
        with self._lock:
            strips = min(SPARE_STRIPS, self._limit - self._mapped)
            if strips > 0:
                with self._unlocked(strips):
                    self._memory.create(strips * self._layout.tensors)

    @contextmanager
    def _unlocked(self, strips: int, row: _Row | None = None) -> Iterator[None]:
        """Lets go of the lock while the driver is at it, which takes long: others go on, and leave room for strips."""
        self._coming, self._coming_to = strips, row
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()
            self._coming, self._coming_to = 0, None
            self._lock.notify_all()

    def _short(self, strips: int) -> int:
        """How many strips the budget lacks for so many more."""
        return self._mapped + self._coming + strips - self._limit

    def _make_room(self, strips: int, asker: _Row, *, urgent: bool) -> bool:
        """Takes back as many strips as the budget lacks, or none if there are not enough."""
        short = self._short(strips)
        if short <= 0:
            return True
        victims = list(self._victims(asker, urgent=urgent))
        lowest = dict(victims)  # the last floor of a row is its lowest
        if sum(max(0, row.pages - pages) for row, pages in lowest.items()) < short:
            return False
        for row, pages in victims:
            short -= self._shrink(row, max(pages, row.pages - short))
        return True

    def _victims(self, asker: _Row | None, *, urgent: bool) -> Iterator[tuple[_Row, int]]:
        """Rows that can give pages, and how many each must keep: what is least worth keeping first."""
        rows, pages = [row for row in self._rows if row is not asker], self._layout.pages
        busy = [row for row in rows if row.busy]
        ended = sorted((row for row in rows if not row.busy), key=lambda row: row.ended)
        yield from ((row, pages(row.tokens)) for row in ended)  # what nobody will read
        yield from ((row, pages(row.tokens) + 1) for row in busy)  # left over from the slot's sequence before
        yield from ((row, 0) for row in ended)  # what might be read again: the oldest first, from its end
        if urgent:
            yield from ((row, pages(row.tokens)) for row in busy)  # mapped ahead

    def _shrink(self, row: _Row, pages: int) -> int:
        """Unmaps a row's pages from a number on. Returns how many, per tensor."""
        surplus = row.pages - pages
        if surplus <= 0:
            return 0
        if row.fence is not None:
            row.fence.synchronize()
            row.fence = None
        for offset in self._layout.offsets(row.index, pages):
            self._memory.unmap(offset, surplus * self._layout.page_bytes)
        row.pages = pages
        if not row.busy:
            row.tokens = min(row.tokens, self._layout.tokens(pages))
        self._mapped -= surplus
        self._unmaps += surplus
        return surplus
