"""Virtual memory for keys and values: what it promises, what it counts, and what the system says of it.

Shapes: S slots, T tokens, K key-value heads, H head dim.
"""

import mmap
import random
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from raygrow.infer import kv_cache
from raygrow.infer.kv_cache import KvCache
from raygrow.infer.kv_layout import Layout
from raygrow.nn.config import ModelConfig
from tests.infer import fake_driver
from tests.infer.fake_driver import FakeDriver

CONFIG = ModelConfig(vocab_size=16, d_model=16, n_heads=4, n_kv_heads=2, d_ff=32, blocks_per_stack=3)
LAYOUTS: list[Layout] = ["block", "interleaved"]
PAGE = mmap.PAGESIZE
TOKEN = 2 * 2 * 4 * 4
"""Bytes of a token's keys and values in one Block: a page holds 64 of them."""


def strip_bytes(layout: Layout) -> int:
    """Of one page in every tensor."""
    return PAGE * (1 if layout == "interleaved" else CONFIG.n_blocks)


def make_cache(
    layout: Layout = "block",
    *,
    slots: int = 4,
    max_tokens: int = 400,
    strips: int = 1000,
    dtype: torch.dtype = torch.float32,
) -> KvCache:
    return KvCache(
        CONFIG,
        slots=slots,
        max_tokens=max_tokens,
        dtype=dtype,
        device="cpu",
        budget_bytes=strips * strip_bytes(layout),
        layout=layout,
        page_bytes=PAGE,
    )


@pytest.fixture(params=["host", "driver"])
def driver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeDriver | None:
    """Where the pages come from: the host, or a driver."""
    if request.param == "host":
        return None
    driver = FakeDriver(most_pages=100_000)
    fake_driver.use(driver, monkeypatch)
    return driver


def resident_bytes(tensor: Tensor) -> int:
    """Physical memory of the mapping that a tensor lies in, as the system counts it."""
    address, found = tensor.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(span[1], 16) <= address < int(span[2], 16)
        elif found and line.startswith("Rss:"):
            return 1024 * int(line.split()[1])
    raise AssertionError(f"no mapping at {address:x}")


def write(cache: KvCache, slot: int, start: int, stop: int, value: int) -> None:
    """Fills tokens of a slot, differently in every tensor."""
    for number, tensor in enumerate((*cache.k, *cache.v)):
        tensor[slot, start:stop] = 100 * value + number


def assert_holds(cache: KvCache, slot: int, tokens: int, value: int) -> None:
    for number, tensor in enumerate((*cache.k, *cache.v)):
        assert (tensor[slot, :tokens] == 100 * value + number).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_virtual_and_apart(layout: Layout, dtype: torch.dtype) -> None:
    cache = make_cache(layout, slots=64, max_tokens=1_000_000, dtype=dtype)
    before = resident_bytes(cache.k[0])
    assert [tensor.shape for tensor in (*cache.k, *cache.v)] == [(65, 1_000_000, 2, 4)] * 6
    assert all(tensor.dtype == dtype and tensor.stride()[2:] == (4, 1) for tensor in (*cache.k, *cache.v))
    assert before == cache.usage.mapped_bytes == strip_bytes(layout)  # the scratch slot's
    # 65 x 1M tokens, of which the first tokens of one slot become real
    assert cache.ensure(63, 10)
    write(cache, 63, 0, 10, value=1)
    assert_holds(cache, 63, 10, value=1)
    assert resident_bytes(cache.k[0]) == 2 * before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_accounting_follows_a_sequence(layout: Layout, driver: FakeDriver | None) -> None:
    cache, strip = make_cache(layout), strip_bytes(layout)
    per_page = PAGE // (TOKEN * (1 if layout == "block" else 3))
    assert cache.ensure(1, per_page)
    assert cache.usage.used_bytes == cache.usage.mapped_bytes == 2 * strip
    assert cache.ensure(1, per_page + 1)
    assert cache.usage.used_bytes == 3 * strip
    assert cache.usage.maps == 3 * strip // PAGE
    assert cache.held(1) == 0  # running
    cache.release(1, keep_tokens=per_page + 1)
    assert cache.held(1) == per_page + 1
    assert cache.usage.used_bytes == strip
    assert cache.usage.reclaimable_bytes == 2 * strip
    assert cache.capacity(1) >= per_page + 1
    assert cache.reclaim() == 2 * strip
    assert cache.held(1) == cache.capacity(1) == 0
    assert cache.usage.mapped_bytes == strip
    assert cache.usage.unmaps == 2 * strip // PAGE
    cache.close()


def test_a_slot_is_taken_over_with_what_it_holds(driver: FakeDriver | None) -> None:
    cache = make_cache()
    assert cache.ensure(0, 200)
    write(cache, 0, 0, 200, value=7)
    cache.release(0, keep_tokens=150)
    maps = cache.usage.maps
    assert cache.ensure(0, 180)
    assert cache.usage.maps == maps
    assert cache.found(0) == 150
    assert_holds(cache, 0, 150, value=7)
    cache.close()


def test_the_oldest_sequence_gives_its_end_first() -> None:
    cache = make_cache(strips=1 + 6)  # the scratch slot's and six
    for slot in (0, 1, 2):
        assert cache.ensure(slot, 128)  # two pages each
        write(cache, slot, 0, 128, value=slot)
    cache.release(1, keep_tokens=128)
    cache.release(0, keep_tokens=128)
    assert cache.ensure(3, 64)
    assert (cache.held(1), cache.held(0)) == (64, 128)
    assert_holds(cache, 1, 64, value=1)
    assert cache.ensure(3, 128)
    assert (cache.held(1), cache.held(0)) == (0, 128)
    assert cache.ensure(3, 192)
    assert cache.held(0) == 64
    assert_holds(cache, 0, 64, value=0)
    assert_holds(cache, 2, 128, value=2)
    # two strips more than there are, with or without what slot 0 holds: nothing is lost in the attempt
    assert not cache.ensure(3, 400)
    assert cache.held(0) == 64
    # what nobody wants to read goes before what is held
    cache.release(2, keep_tokens=10)
    assert cache.ensure(3, 256)
    assert (cache.held(0), cache.held(2)) == (64, 10)


def test_mapping_ahead_is_one_page_and_gives_way(driver: FakeDriver | None) -> None:
    cache = make_cache(strips=1 + 4)
    assert cache.ensure(0, 10)
    cache.map_ahead(0, 400)
    settle(cache)
    assert cache.capacity(0) == 128
    assert cache.usage.reclaimable_bytes == strip_bytes("block")
    assert cache.ensure(1, 128)
    assert cache.ensure(0, 100)  # as was foreseen
    assert cache.usage.maps == 5 * 3
    cache.release(1)
    assert cache.ensure(2, 10)
    cache.map_ahead(2, 100)
    settle(cache)
    cache.map_ahead(0, 200)  # nobody's page ahead is taken for another page ahead
    settle(cache)
    assert (cache.capacity(2), cache.capacity(0)) == (128, 128)
    assert cache.ensure(0, 192)  # but for tokens it is
    assert cache.capacity(2) == 64
    cache.close()


def settle(cache: KvCache) -> None:
    """Waits for pages that are being mapped ahead."""
    if cache._mapper is not None:
        cache._mapper.submit(lambda: None).result()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_what_can_still_be_read(layout: Layout) -> None:
    cache = make_cache(layout)
    assert cache.ensure(0, 333)
    write(cache, 0, 0, 333, value=3)
    assert cache.ensure(1, 200)
    assert cache.copy(0, 1, 100) == 100
    assert_holds(cache, 1, 100, value=3)
    assert not cache.k[0][1, 100].any()
    cache.release(0, keep_tokens=50)
    assert cache.copy(0, 1, 200) == 50


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match=r"budget_bytes=12,288: .* at least 24,576 \(3 tensors"):
        make_cache(strips=1)
    with pytest.raises(ValueError, match="page_bytes=1000: must be a multiple"):
        KvCache(CONFIG, slots=1, max_tokens=9, dtype=torch.float32, device="cpu", budget_bytes=10**9, page_bytes=1000)
    cache = make_cache()
    with pytest.raises(ValueError, match="tokens=401: a slot has positions for 0 to 400"):
        cache.ensure(0, 401)
    for slot in (0, cache.scratch):
        with pytest.raises(ValueError, match=f"slot {slot} has no sequence"):
            cache.release(slot)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strips", [2, 5, 1000])
def test_the_longest_sequence_fits(layout: Layout, strips: int) -> None:
    cache = make_cache(layout, strips=strips)
    longest = cache.max_sequence_tokens
    assert cache.ensure(0, longest)
    assert longest == 400 or not cache.ensure(0, longest + 1)


def test_the_device_is_done_before_pages_go(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_driver.use(driver := FakeDriver(most_pages=1000), monkeypatch)
    cache = make_cache()
    cache.ensure(0, 100)
    cache.release(0)
    driver.calls.clear()
    cache.reclaim()
    assert driver.calls[0] == "wait"
    assert driver.calls.count("wait") == 1
    assert driver.calls.count("unmap") == 6
    cache.close()
    assert not driver.handles


def test_access_is_set_once_for_pages_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_driver.use(driver := FakeDriver(most_pages=1000), monkeypatch)
    cache = make_cache()
    driver.calls.clear()
    cache.ensure(0, 300)
    assert driver.calls.count("map") == 5 * 3
    assert driver.calls.count("set_access") == 3
    assert driver.mapped.keys() == driver.accessible
    cache.close()


def test_a_device_with_less_memory_than_the_budget_makes_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_driver.use(driver := FakeDriver(most_pages=3 * 4), monkeypatch)
    cache = make_cache()
    assert cache.ensure(0, 128)
    cache.release(0)
    assert cache.ensure(1, 192)  # with a page of slot 0
    write(cache, 1, 0, 192, value=1)
    assert not cache.ensure(2, 1)
    assert "less memory than the KV cache's budget" in caplog.text
    assert_holds(cache, 1, 192, value=1)
    assert driver.mapped.keys() == driver.accessible
    cache.close()


def test_a_failure_of_the_helper_thread_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_driver.use(driver := FakeDriver(most_pages=1000), monkeypatch)
    cache = make_cache()
    cache.ensure(0, 10)
    monkeypatch.setattr(driver, "cuMemMap", lambda *args: (fake_driver.Result.CUDA_ERROR_OUT_OF_MEMORY,))
    cache.map_ahead(0, 100)
    settle(cache)
    with pytest.raises(RuntimeError, match="could not map"):
        cache.ensure(0, 100)


def test_nobody_waits_for_pages_that_are_mapped_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_driver.use(driver := FakeDriver(most_pages=1000), monkeypatch)
    cache = make_cache()
    cache.ensure(0, 10)
    begun, go_on, map_page = threading.Event(), threading.Event(), driver.cuMemMap

    def map_slowly(*arguments) -> tuple:
        begun.set()
        assert go_on.wait(10)
        return map_page(*arguments)

    monkeypatch.setattr(driver, "cuMemMap", map_slowly)
    cache.map_ahead(0, 100)
    assert begun.wait(10)
    assert cache.ensure(0, 64)
    assert cache.usage.mapped_bytes == 2 * strip_bytes("block")
    go_on.set()  # had one of these waited, mapping would have failed
    settle(cache)
    assert cache.ensure(0, 65)
    assert cache.usage.mapped_bytes == 3 * strip_bytes("block")
    cache.close()


def test_nobody_but_its_own_sequence_waits_for_a_page_that_is_created(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_driver.use(driver := FakeDriver(most_pages=1000), monkeypatch)
    cache = make_cache()
    for slot in (0, 1, 2):
        cache.ensure(slot, 10)
    begun, go_on, create_page = threading.Event(), threading.Event(), driver.cuMemCreate

    def create_slowly(*arguments) -> tuple:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert go_on.wait(10)
        return create_page(*arguments)

    monkeypatch.setattr(driver, "cuMemCreate", create_slowly)
    cache.reclaim()  # but for the spare pages of two strips
    cache.ensure(1, 65)
    cache.ensure(1, 129)
    cache.map_ahead(0, 100)
    assert begun.wait(10)
    assert cache.ensure(1, 200)
    cache.release(2)
    assert cache.ensure(2, 64)
    assert cache.copy(1, 2, 50) == 50
    threading.Timer(0.05, go_on.set).start()
    assert cache.ensure(0, 100)  # this one waits: a page must not be mapped twice
    assert cache.capacity(0) == 128
    settle(cache)
    assert cache.usage.mapped_bytes == (1 + 2 + 4 + 1) * strip_bytes("block")
    cache.close()
    assert not driver.handles


def test_memory_that_is_there_again_is_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    fake_driver.use(driver := FakeDriver(most_pages=3 * 4), monkeypatch)
    cache = make_cache()
    assert cache.ensure(0, 192)
    for _ in range(3):
        assert not cache.ensure(1, 64)
    assert len(caplog.records) == 1
    driver.most_pages = 3 * 9
    calls = len(driver.calls)
    assert not cache.ensure(1, 64)  # the device is not asked again and again
    assert len(driver.calls) == calls
    monkeypatch.setattr(kv_cache, "SECONDS_WITHOUT", 0.0)
    cache._ask_again = 0.0
    assert cache.ensure(1, 256)
    assert not cache.ensure(2, 128)
    assert cache.ensure(2, 64)
    driver.most_pages = 100
    assert cache.ensure(2, 400)
    assert cache.usage.mapped_bytes == (1 + 3 + 4 + 7) * strip_bytes("block")
    cache.close()


def test_closing_twice_is_closing_once(driver: FakeDriver | None) -> None:
    cache = make_cache()
    cache.ensure(0, 100)
    cache.close()
    cache.close()
    assert driver is None or not (driver.handles or driver.contexts)


class Sequences:
    """Random sequences on a cache, beside a plain record of what the cache must hold.

    `running` and `ended` give, by slot, the value that a sequence writes and its tokens.
    """

    def __init__(self, cache: KvCache, seed: int) -> None:
        self.cache, self.random = cache, random.Random(seed)
        self.running: dict[int, tuple[int, int]] = {}
        self.ended: dict[int, tuple[int, int]] = {}
        self.refused = self.reused = self.values = 0

    def operate(self) -> None:
        """One operation, whatever it is."""
        operations: list[tuple[Callable[[], None], int]] = [
            (self.start, 2 if len(self.running) < self.cache.scratch else 0),
            (self.grow, 6 if self.running else 0),
            (self.ahead, 3 if self.running else 0),
            (self.end, 2 if self.running else 0),
            (self.copy, 1 if self.running else 0),
        ]
        if self.random.random() < 0.01:
            self.reclaim()
        else:
            self.random.choices(*zip(*operations, strict=True))[0]()

    def start(self) -> None:
        slot = self.random.choice([slot for slot in range(self.cache.scratch) if slot not in self.running])
        tokens = self.random.randint(1, self.cache.max_tokens // 2)
        value, held = self.ended.get(slot, (0, 0))[0], min(tokens, self.cache.held(slot))
        if not held or self.random.random() < 0.3:
            self.values += 1
            value, held = self.values % 50, 0
        if self.ensure(slot, tokens):
            held = min(held, self.cache.found(slot))  # the thread that maps ahead may have taken some since
            self.reused += held > 0
            self.ended.pop(slot, None)
            self.running[slot] = value, tokens
            write(self.cache, slot, held, tokens, value)

    def grow(self) -> None:
        slot = self.random.choice(list(self.running))
        value, before = self.running[slot]
        tokens = min(self.cache.max_tokens, before + self.random.choice([1, 1, 5, 60]))
        if self.ensure(slot, tokens):
            self.running[slot] = value, tokens
            write(self.cache, slot, before, tokens, value)

    def ensure(self, slot: int, tokens: int) -> bool:
        done = self.cache.ensure(slot, tokens)
        self.refused += not done
        return done

    def ahead(self) -> None:
        slot = self.random.choice(list(self.running))
        self.cache.map_ahead(slot, self.running[slot][1] + 20)

    def end(self) -> None:
        slot = self.random.choice(list(self.running))
        value, tokens = self.running.pop(slot)
        kept = self.random.randint(0, tokens)
        self.cache.release(slot, keep_tokens=kept)
        self.ended[slot] = value, kept

    def copy(self) -> None:
        target = self.random.choice(list(self.running))
        sources = [slot for slot in {**self.running, **self.ended} if slot != target]
        if sources:
            source = self.random.choice(sources)
            value, tokens = self.running.get(source) or self.ended[source]
            wanted = min(tokens, self.running[target][1])
            copied = self.cache.copy(source, target, wanted)
            assert copied == wanted if source in self.running else copied <= wanted
            assert_holds(self.cache, target, copied, value)
            own = self.running[target]
            write(self.cache, target, 0, copied, own[0])

    def reclaim(self) -> None:
        settle(self.cache)
        expected = self.cache.usage.reclaimable_bytes
        assert self.cache.reclaim() == expected
        assert self.cache.usage.reclaimable_bytes == 0

    def check(self) -> None:
        """Every token is what its own sequence wrote; memory is what it is counted as, and within the budget."""
        cache = self.cache
        for slot, (value, tokens) in self.running.items():
            assert cache.capacity(slot) >= tokens
            assert_holds(cache, slot, tokens, value)
        for slot, (value, kept) in self.ended.items():
            assert cache.held(slot) <= kept
            assert_holds(cache, slot, cache.held(slot), value)
        usage = cache.usage
        assert usage.used_bytes + usage.reclaimable_bytes == usage.mapped_bytes
        assert usage.mapped_bytes + usage.spare_bytes <= usage.budget_bytes
        page, strip, token = cache._layout.page_bytes, cache._layout.strip_bytes, cache._layout.token_bytes
        assert (usage.maps - usage.unmaps) * page == usage.mapped_bytes
        pages = 1 + sum(-(-tokens * token // page) for _, tokens in self.running.values())
        assert usage.used_bytes == pages * strip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_leaks_and_nothing_is_shared(layout: Layout, driver: FakeDriver | None) -> None:
    """10,000 random operations. The driver refuses by itself to map a page twice, and what it unmaps turns NaN."""
    strips = 12 if layout == "block" else 28
    cache = make_cache(layout, slots=6, strips=strips)
    sequences = Sequences(cache, seed=0)
    for step in range(10_000):
        sequences.operate()
        if step % 50:
            continue
        settle(cache)
        sequences.check()
        if driver is None:
            if step % 200 == 0:  # the system is slow to tell
                usage, resident = cache.usage, resident_bytes(cache.k[0])
                assert usage.used_bytes <= resident <= usage.mapped_bytes
        else:
            assert len(driver.mapped) * PAGE == cache.usage.mapped_bytes
            assert len(driver.handles) * PAGE == cache.usage.mapped_bytes + cache.usage.spare_bytes
            assert driver.mapped.keys() == driver.accessible
    # the test has been where it is hard
    assert sequences.refused > 100
    assert sequences.reused > 100
    for slot in sequences.running:
        cache.release(slot)
    settle(cache)
    cache.reclaim()
    floor = strip_bytes(layout)
    assert cache.usage.mapped_bytes == cache.usage.used_bytes == floor
    if driver is None:
        assert resident_bytes(cache.k[0]) == floor
    cache.close()
    if driver is None:
        assert resident_bytes(cache.k[0]) == 0
    else:
        assert not driver.handles
