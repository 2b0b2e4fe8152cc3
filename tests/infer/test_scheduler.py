"""The scheduler over a cache that only counts: who runs, who waits, who has to make room."""

from types import SimpleNamespace

import pytest
import torch

from raygrow.infer.request import Request
from raygrow.infer.sampling import Sampling
from raygrow.infer.scheduler import Chunk, Scheduler
from raygrow.infer.sequence import Sequence
from raygrow.infer.slots import MIN_AWAITED, MIN_COPIED, Slots
from tests.infer import fake_driver
from tests.infer.fake_driver import FakeDriver
from tests.infer.test_kv_cache import make_cache, settle


class CountingCache:
    """As KvCache, with one token to a page. `k` and `v` hold a number for each token."""

    def __init__(self, slots: int, budget: int) -> None:
        self.budget, self.busy, self.kept, self.before = budget, {}, dict.fromkeys(range(slots), 0), {}
        self.k, self.v = ([torch.zeros(slots, 1000)] for _ in range(2))

    def ensure(self, slot: int, tokens: int) -> bool:
        others = sum(count for other, count in self.busy.items() if other != slot)
        if others + tokens > self.budget:
            return False
        if slot not in self.busy:
            self.before[slot] = self.kept[slot]
        self.busy[slot] = tokens
        self.kept[slot] = 0
        for other, count in self.kept.items():  # takes back what is needed
            short = sum(self.busy.values()) + sum(self.kept.values()) - self.budget
            self.kept[other] -= max(0, min(count, short))
        return True

    def release(self, slot: int, keep_tokens: int = 0) -> None:
        del self.busy[slot]
        self.kept[slot] = keep_tokens

    def held(self, slot: int) -> int:
        return self.kept[slot]

    def found(self, slot: int) -> int:
        return self.before[slot]

    def copy(self, source: int, target: int, tokens: int) -> int:
        for store in (*self.k, *self.v):
            store[target, :tokens] = store[source, :tokens]
        return tokens

    def map_ahead(self, slot: int, tokens: int) -> None:
        assert slot in self.busy


def make(*, slots: int = 3, budget: int = 1000, tokens: int = 100, reuse: bool = True) -> SimpleNamespace:
    cache = CountingCache(slots, budget)
    return SimpleNamespace(cache=cache, scheduler=Scheduler(Slots(cache, slots, reuse=reuse), tokens))  # type: ignore[arg-type]


def sequence(name: str, prompt: range | list[int]) -> Sequence:
    return Sequence(Request(id=name, prompt=tuple(prompt), sampling=Sampling(max_tokens=1000)))


def step(made: SimpleNamespace) -> list[tuple[str, int, int]]:
    """One step: computes the chunks and adds a token to those that complete. What was computed."""
    chunks: list[Chunk] = made.scheduler.schedule()
    for sequence, start, stop in chunks:
        assert sequence.slot is not None
        made.cache.k[0][sequence.slot, start:stop] = torch.tensor(sequence.tokens[start:stop], dtype=torch.float32)
        completes = stop == len(sequence.tokens)
        sequence.computed = stop
        if completes:
            sequence.tokens.append(7)
    return [(chunk.sequence.request.id, chunk.start, chunk.stop) for chunk in chunks]


def test_decoding_comes_first_and_prompts_share_what_is_left():
    made = make(tokens=10)
    for name, length in (("a", 4), ("b", 12), ("c", 3)):
        made.scheduler.add(sequence(name, range(100, 100 + length)))
    assert step(made) == [("a", 0, 4), ("b", 0, 6)]
    assert step(made) == [("a", 4, 5), ("b", 6, 12), ("c", 0, 3)]
    assert step(made) == [("a", 5, 6), ("b", 12, 13), ("c", 3, 4)]


def test_a_single_token_of_a_prompt_stands_among_the_decoding_ones():
    made = make(tokens=10)
    made.scheduler.add(sequence("a", range(9)))
    made.scheduler.add(sequence("b", [50, 51, 52]))
    assert step(made) == [("b", 0, 1), ("a", 0, 9)]


def test_no_one_passes_the_one_who_waits_longest():
    made = make(slots=3, budget=20)
    for name, length in (("a", 10), ("b", 15), ("c", 2)):
        made.scheduler.add(sequence(name, range(100, 100 + length)))
    assert step(made) == [("a", 0, 10)]
    assert [waiting.request.id for waiting in made.scheduler.waiting] == ["b", "c"]


def test_the_youngest_makes_room_and_comes_back_before_the_others():
    made = make(slots=3, budget=12)
    a, b, c = (sequence(name, range(start, start + 5)) for name, start in (("a", 0), ("b", 100), ("c", 200)))
    for each in (a, b, c):
        made.scheduler.add(each)
    step(made)
    assert step(made) == [("a", 5, 6), ("b", 5, 6)]
    assert step(made) == [("a", 6, 7)]
    assert made.scheduler.preemptions == 1
    assert [waiting.request.id for waiting in made.scheduler.waiting] == ["b", "c"]
    assert b.slot is None
    assert len(b.tokens) == 7
    made.scheduler.remove(a)
    assert step(made)[0] == ("b", 5, 7)  # what memory was not needed it finds again
    made.scheduler.remove(c)
    assert not made.scheduler.waiting


def test_the_youngest_may_be_the_one_that_needs_room():
    made = make(slots=2, budget=13)
    made.scheduler.add(sequence("a", range(6)))
    made.scheduler.add(sequence("b", range(100, 106)))
    step(made)
    assert step(made) == [("a", 6, 7)]
    assert made.scheduler.preemptions == 1


def test_a_slot_that_began_alike_is_taken_over_and_an_empty_one_before_others():
    made = make(slots=3)
    for name, start in (("a", 0), ("b", 500)):
        made.scheduler.add(ended := sequence(name, range(start, start + 40)))
        step(made)
        made.scheduler.remove(ended)
    made.scheduler.add(other := sequence("other", range(300, 310)))
    step(made)
    assert other.slot == 2
    made.scheduler.add(again := sequence("again", [*range(500, 530), 1, 2]))
    assert step(made)[1:] == [("again", 30, 32)]
    assert again.slot == 1
    made.scheduler.add(last := sequence("last", range(700, 710)))
    step(made)
    assert last.slot == 0


def test_beginnings_are_copied_from_sequences_that_run():
    made = make(slots=3)
    made.scheduler.add(first := sequence("first", range(60)))
    step(made)
    made.scheduler.add(second := sequence("second", [*range(MIN_COPIED), 900, 901]))
    made.scheduler.add(third := sequence("third", [*range(MIN_COPIED - 1), 900, 901]))
    assert step(made)[1:] == [("second", MIN_COPIED, MIN_COPIED + 2), ("third", 0, MIN_COPIED + 1)]
    assert second.slot != first.slot
    assert made.cache.k[0][second.slot, :MIN_COPIED].tolist() == list(range(MIN_COPIED))
    assert made.cache.k[0][third.slot, 0] == 0


def test_a_prompt_that_another_is_computing_is_waited_for_and_copied():
    made = make(slots=3, tokens=MIN_AWAITED + 60)
    long, short = range(MIN_AWAITED + 1), range(500, 500 + MIN_AWAITED)
    for name, prompt in (("first", long), ("second", long), ("other", range(800, 810))):
        made.scheduler.add(sequence(name, prompt))
    end = len(long)
    assert step(made) == [("first", 0, end)]
    assert step(made) == [("first", end, end + 1), ("second", end - 1, end), ("other", 0, 10)]
    made = make(slots=3, tokens=1000)
    for name in ("first", "second"):
        made.scheduler.add(sequence(name, short))
    assert step(made) == [("first", 0, MIN_AWAITED), ("second", 0, MIN_AWAITED)]


def test_nobody_waits_for_a_prompt_that_is_given_up():
    made = make(slots=3, tokens=40)
    made.scheduler.add(first := sequence("first", range(200)))
    made.scheduler.add(sequence("second", range(200)))
    assert step(made) == [("first", 0, 40)]
    made.scheduler.remove(first)
    assert step(made) == [("second", 40, 80)]


def test_what_is_not_computed_yet_is_not_reused():
    made = make(slots=2, tokens=40)
    made.scheduler.add(sequence("first", range(60)))
    made.scheduler.add(sequence("second", range(50)))
    assert step(made) == [("first", 0, 40)]
    assert step(made) == [("first", 40, 60), ("second", 40, 50)]


def test_what_memory_took_back_is_not_reused():
    made = make(slots=2, budget=100)
    for name, prompt in (("first", range(90)), ("big", range(300, 340))):
        made.scheduler.add(ended := sequence(name, prompt))
        step(made)
        made.scheduler.remove(ended)
    assert made.cache.held(0) == 60
    made.scheduler.add(sequence("again", range(80)))
    assert step(made) == [("again", 60, 80)]


def test_a_copy_takes_only_what_its_own_memory_has_left():
    made = make(slots=3, budget=100)
    made.scheduler.add(first := sequence("first", range(90)))
    step(made)
    made.scheduler.remove(first)
    made.scheduler.add(sequence("again", [*range(40), *range(900, 925)]))
    assert step(made) == [("again", 35, 65)]


def test_what_mapping_ahead_takes_at_the_last_moment_is_not_reused(monkeypatch: pytest.MonkeyPatch):
    fake_driver.use(FakeDriver(most_pages=1000), monkeypatch)
    cache = make_cache(slots=2, strips=1 + 4)  # pages of 64 tokens
    slots = Slots(cache, 2, reuse=True)
    first, other = sequence("first", range(128)), sequence("other", range(500, 628))
    for each in (first, other):
        assert slots.take(each)
        each.computed = 128
    slots.give_back(first)
    choose = slots._choose

    def choose_while_the_other_grows(match) -> int:
        assert match.length == 127
        assert other.slot is not None
        cache.map_ahead(other.slot, 150)
        settle(cache)
        return choose(match)

    monkeypatch.setattr(slots, "_choose", choose_while_the_other_grows)
    again = sequence("again", range(128))
    assert slots.take(again)
    assert again.computed == 64
    cache.close()
