"""The text of a sequence and where it ends."""

from raygrow.infer.request import FinishReason
from raygrow.infer.sequence import Sequence
from raygrow.text.decoding import IncrementalDecoder, StopFinder
from raygrow.text.tokenizer import Tokenizer


class Output:
    """Takes the tokens of a sequence and gives out text.

    Args:
        sequence: Of which `tokens` holds each token when it is pushed.
        tokenizer: Decodes.
        end_ids: Tokens that end a text.
        max_tokens: New tokens at most.
    """

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer, *, end_ids: frozenset[int], max_tokens: int) -> None:
        sampling = sequence.request.sampling
        self._stop_ids = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else end_ids)
        self._left = max_tokens
        self._decoder = IncrementalDecoder(tokenizer, sequence.request.prompt)
        self._stops = StopFinder(sampling.stop) if sampling.stop else None

    def push(self, token: int) -> tuple[str, FinishReason | None]:
        """The text that a new token adds, as far as it is certain, and why the sequence ends with it, if it does."""
        self._left -= 1
        ends = token in self._stop_ids
        text = "" if ends else self._decoder.push([token])
        last = ends or not self._left
        if last:
            text += self._decoder.flush()
        stopped = False
        if self._stops is not None:
            text, stopped = self._stops.push(text)
            if last and not stopped:
                text += self._stops.flush()
        if ends or stopped:
            return text, "stop"
        return text, "length" if last else None
