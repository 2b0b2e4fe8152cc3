"""What each step computes: a token of every running sequence, then as much of the prompts as there is room for."""

from collections import deque
from typing import NamedTuple

from raygrow.infer.sequence import Sequence
from raygrow.infer.slots import Slots


class Chunk(NamedTuple):
    """Tokens of one sequence that a step computes. Of a sparse one they are all of the prompt, or all of the answer."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def single(self) -> bool:
        """Whether it is one token."""
        return self.stop - self.start == 1

    @property
    def sparse(self) -> bool:
        """Whether its tokens are."""
        return self.sequence.sparse and self.start >= self.sequence.prompt_length

    @property
    def place(self) -> int:
        """Among the chunks of a step: those of a single token first, and what is sparse all together."""
        if self.single:
            return 1 if self.sparse else 0
        return 2 if self.sparse else 3

    @property
    def completes(self) -> bool:
        """Whether the sequence's next token can be chosen after it."""
        return self.stop == len(self.sequence.tokens)

    @property
    def wanted(self) -> range:
        """Positions whose logits are wanted: the last one's if it completes, all where the prompt is to be scored."""
        sequence, start, stop = self
        return range(start if sequence.unscored else stop - (stop == len(sequence.tokens)), stop)


class Scheduler:
    """First come, first served, in one queue.

    A sequence that begins like one whose prompt is being computed waits for that, and copies it. One that is let in has
    memory for all the tokens it comes with. When a running one needs more and there is
    none, the youngest is *preempted*: it gives back its slot, goes to the front of the queue, and is computed again,
    with the tokens that it has, once there is room.

    Args:
        slots: Where sequences run.
        max_batched_tokens: Tokens of one step.
    """

    def __init__(self, slots: Slots, max_batched_tokens: int) -> None:
        self._slots, self._max_batched_tokens = slots, max_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In the order in which they were let in."""
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Lets a sequence wait for its turn."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out that has ended or is no longer wanted; its slot is free at once."""
        sequence.ended = True
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._slots.give_back(sequence)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step, by their `place`.

        `computed` of their sequences is for the caller to move on.
        """
        singles = self._decodes()
        room = self._max_batched_tokens - len(singles)
        chunks = []
        if len(singles) < len(self.running):
            for sequence in self.running:
                if room and sequence.missing > 1:
                    chunks.append(_chunk(sequence, room))
                    room -= chunks[-1].stop - chunks[-1].start
        while room and self._let_in():
            sequence = self.running[-1]
            chunks.append(_chunk(sequence, room))
            room -= chunks[-1].stop - chunks[-1].start
        if not chunks:
            return singles
        return sorted(singles + chunks, key=lambda chunk: chunk.place)

    def _let_in(self) -> bool:
        """Lets the one in who has waited longest, if there is a place and nothing that is better waited for."""
        if not self.waiting or not self._slots.free or self._slots.awaits(self.waiting[0]):
            return False
        if not self._slots.take(self.waiting[0]):
            return False
        sequence = self.waiting.popleft()
        self.running.append(sequence)
        if sequence.cached is None:
            sequence.cached = sequence.computed
        return True

    def _decodes(self) -> list[Chunk]:
        """One token of every sequence that misses no more, by their place, the oldest first."""
        dense, sparse = [], []
        for sequence in list(self.running):  # from which making room takes the youngest
            if sequence.slot is not None and sequence.missing == 1 and self._make_room(sequence):
                chunk = Chunk(sequence, sequence.computed, sequence.computed + 1)
                (sparse if chunk.sparse else dense).append(chunk)
        return dense + sparse

    def _make_room(self, sequence: Sequence) -> bool:
        """Memory for all tokens of a running sequence; False if it was itself the youngest and had to go."""
        assert sequence.slot is not None
        while not self._slots.grow(sequence):
            youngest = self.running.pop()
            self._slots.give_back(youngest)
            self.waiting.appendleft(youngest)
            self.preemptions += 1
            if youngest is sequence:
                return False
        return True


def _chunk(sequence: Sequence, room: int) -> Chunk:
    start, stop = sequence.computed, sequence.computed + min(room, sequence.missing)
    # an answer that is computed again is not in one chunk with its prompt
    return Chunk(sequence, start, min(stop, sequence.alike) if start < sequence.alike else stop)
