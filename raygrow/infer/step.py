"""One step on its way: what the device was asked for, and what comes of it.

Shapes: L rows whose logits are wanted, R rows of sequences that get a token, V vocabulary.
"""

from collections.abc import Sequence as Row

from torch import Tensor

from raygrow.infer.request import Logprob
from raygrow.infer.runner import Computed
from raygrow.infer.sampler import NOT_A_NUMBER, choose_tokens, likeliest, logprobs
from raygrow.infer.scheduler import Chunk
from raygrow.infer.sequence import Sequence
from raygrow.infer.staging import OnItsWay, to_device


class Step:
    """The tokens that a step gives to sequences, and their log-probabilities. Making one does not wait for the device.

    Args:
        chunks: What the step computes.
        computed: What the model says to it. It may be overwritten once `take` has returned.
    """

    def __init__(self, chunks: Row[Chunk], computed: Computed) -> None:
        self._logits_LV = computed.logits_LV
        self._scores: list[tuple[Sequence, int, int]] = []
        """Sequence, position and row of tokens of prompts that are to be scored."""
        self._sampled: list[tuple[Sequence, int]] = []
        """Sequences that get a token, and the rows that it is chosen from."""
        self.scored: list[Sequence] = []
        """Sequences that end with this step, without a token."""
        row = 0
        for chunk in chunks:
            sequence, start, stop = chunk
            if sequence.unscored:
                first = max(start + 1, len(sequence.prompt_logprobs))
                targets = range(first, min(stop + 1, sequence.prompt_length))
                self._scores += [(sequence, target, row + target - 1 - start) for target in targets]
            row += len(chunk.wanted)
            if chunk.completes and sequence.request.sampling.max_tokens:
                self._sampled.append((sequence, row - 1))
            elif chunk.completes:
                self.scored.append(sequence)
            sequence.computed = stop
        self._tokens = OnItsWay(self._choose(computed)) if self._sampled else None

    def take(self) -> list[tuple[Sequence, int, Logprob | None]]:
        """Waits for the device. Prompts get their scores.

        Returns:
            The sequences that get a token and have not ended since the step began, it (or NOT_A_NUMBER), and its
            log-probability where asked for.
        """
        scores = [score for score in self._scores if not score[0].ended]
        if scores:
            tokens = [sequence.tokens[target] for sequence, target, _ in scores]
            counts = [sequence.request.sampling.prompt_logprobs or 0 for sequence, _, _ in scores]
            found = logprobs(self._rows([row for _, _, row in scores]), tokens, counts)
            for (sequence, _, _), logprob in zip(scores, found, strict=True):
                sequence.prompt_logprobs.append(logprob)
        tokens = self._tokens.tolist() if self._tokens else []
        given = [
            (sequence, row, token)
            for (sequence, row), token in zip(self._sampled, tokens, strict=True)
            if not sequence.ended
        ]
        asked = self._new_logprobs(given)
        return [(sequence, token, asked.get(row)) for sequence, row, token in given]

    def _choose(self, computed: Computed) -> Tensor:
        rows = [row for _, row in self._sampled]
        logits_RV, likeliest_R = self._rows(rows), computed.likeliest_L
        if likeliest_R is None or len(likeliest_R) != len(rows):
            likeliest_R = likeliest(logits_RV)
        sequences = [sequence for sequence, _ in self._sampled]
        return choose_tokens(
            logits_RV,
            likeliest_R,
            [sequence.request.sampling for sequence in sequences],
            [sequence.seed for sequence in sequences],
            [sequence.generated for sequence in sequences],
        )

    def _new_logprobs(self, given: list[tuple[Sequence, int, int]]) -> dict[int, Logprob]:
        """Of the chosen tokens, by row, where they are asked for."""
        asked = [
            (row, token, sequence.request.sampling.logprobs)
            for sequence, row, token in given
            if sequence.request.sampling.logprobs is not None and token != NOT_A_NUMBER
        ]
        if not asked:
            return {}
        rows, tokens, counts = zip(*asked, strict=True)
        return dict(zip(rows, logprobs(self._rows(rows), tokens, counts), strict=True))

    def _rows(self, rows: Row[int]) -> Tensor:
        """Rows of the logits, in ascending order."""
        if len(rows) == len(self._logits_LV):
            return self._logits_LV
        return self._logits_LV[to_device(rows, self._logits_LV.device)]
