"""Slots of the key-value cache: which sequence runs in which, and what those of ended sequences can still give."""

from collections.abc import Sequence as Row
from dataclasses import dataclass

from raygrow.infer.kv_cache import KvCache
from raygrow.infer.sequence import Sequence

MIN_COPIED = 32
"""Fewer tokens than this are computed again rather than copied: a copy is not free either."""

MIN_AWAITED = 64
"""Fewer tokens than this are computed at once rather than waited for while another sequence computes the same."""

MAPPED_AHEAD = 32
"""Tokens before the end of a page at which the next one is mapped: time for all slots to get theirs, one by one."""


@dataclass(frozen=True)
class _Match:
    """The tokens that a slot has in common with the beginning of a sequence."""

    length: int = 0
    slot: int = -1


class Slots:
    """Gives slots to sequences and takes them back.

    Args:
        cache: The memory behind the slots.
        count: How many there are.
        reuse: Whether a sequence may begin with keys and values that another has computed.
    """

    def __init__(self, cache: KvCache, count: int, *, reuse: bool) -> None:
        self._cache, self._reuse = cache, reuse
        self._left: dict[int, list[int]] = {slot: [] for slot in range(count)}
        """Free slots, those longest without a sequence first, and the tokens whose keys and values were left there."""
        self._running: dict[int, Sequence] = {}

    @property
    def free(self) -> int:
        """Slots without a sequence."""
        return len(self._left)

    def take(self, sequence: Sequence) -> bool:
        """Gives a sequence a slot with memory for all its tokens, and what other slots know of its beginning.

        Returns:
            False, and nothing has changed, if there is no free slot or not enough memory.
        """
        if not self._left:
            return False
        match = self._best_match(sequence) if self._reuse else _Match()
        slot = self._choose(match)
        if not self._cache.ensure(slot, len(sequence.tokens)):
            return False
        # memory that is mapped ahead in a thread may have been taken from the slot since it was looked at
        computed = min(match.length, self._cache.found(slot)) if slot == match.slot else self._copy(match, slot)
        del self._left[slot]
        self._running[slot] = sequence
        sequence.slot, sequence.computed = slot, computed
        return True

    def awaits(self, sequence: Sequence) -> bool:
        """Whether much more of its beginning can soon be copied: from a running sequence that is at it."""
        if not self._reuse:
            return False
        soon, wanted, reusable = _Match(), sequence.tokens, sequence.reusable
        for slot, other in self._running.items():
            if other.tokens[0] == wanted[0] and other.missing > 1:
                soon = _better(soon, slot, wanted, other.tokens, min(reusable, other.alike))
        return soon.length >= MIN_AWAITED and soon.length - self._best_match(sequence).length >= MIN_AWAITED

    def grow(self, sequence: Sequence) -> bool:
        """Gets memory for all tokens of a running sequence; False if there is not enough."""
        slot, tokens = sequence.slot, len(sequence.tokens)
        assert slot is not None
        if not self._cache.ensure(slot, tokens):
            return False
        self._cache.map_ahead(slot, tokens + MAPPED_AHEAD)
        return True

    def give_back(self, sequence: Sequence) -> None:
        """Ends the stay of a sequence; its keys and values stay readable until their memory is needed."""
        slot = sequence.slot
        assert slot is not None
        del self._running[slot]
        self._left[slot] = sequence.tokens[: min(sequence.computed, sequence.alike)] if self._reuse else []
        self._cache.release(slot, keep_tokens=len(self._left[slot]))
        sequence.slot, sequence.computed = None, 0

    def _best_match(self, sequence: Sequence) -> _Match:
        best, wanted, reusable = _Match(), sequence.tokens, sequence.reusable
        for slot, tokens in self._left.items():
            if tokens:
                best = _better(best, slot, wanted, tokens, min(reusable, self._cache.held(slot), len(tokens)))
        for slot, other in self._running.items():
            if other.tokens[0] == wanted[0]:  # which mostly settles it
                better = _better(best, slot, wanted, other.tokens, min(reusable, other.computed, other.alike))
                best = better if better.length >= MIN_COPIED else best
        return best

    def _choose(self, match: _Match) -> int:
        """The slot of the match, if most of what it holds is of use; else one that has least to give."""
        held = len(self._left.get(match.slot, ()))
        if match.length and 0 < held <= 2 * match.length:
            return match.slot
        others = [slot for slot in self._left if slot != match.slot]
        # an empty one before one with tokens, then the one that has been free longest
        return next((slot for slot in others if not self._left[slot]), others[0] if others else match.slot)

    def _copy(self, match: _Match, slot: int) -> int:
        """Copies what matches into a slot. Returns the number of tokens."""
        length = match.length
        if match.slot in self._left:  # memory for this slot may have been taken from that one
            length = min(length, self._cache.held(match.slot))
        return self._cache.copy(match.slot, slot, length) if length >= MIN_COPIED else 0


def _better(best: _Match, slot: int, wanted: Row[int], tokens: Row[int], readable: int) -> _Match:
    """The match with a slot, if it is longer than the best so far."""
    least = best.length + 1
    if readable < least or wanted[:least] != tokens[:least]:
        return best
    longest = readable
    while least < longest:  # the length of the common beginning, by halving
        middle = (least + longest + 1) // 2
        least, longest = (middle, longest) if wanted[:middle] == tokens[:middle] else (least, middle - 1)
    return _Match(least, slot)
