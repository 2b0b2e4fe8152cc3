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
        self._end_ids = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else end_ids)
        self._left = max_tokens
        self._decoder = IncrementalDecoder(tokenizer, sequence.request.prompt)
        self._stops = StopFinder(sampling.stop) if sampling.stop else None

    def count(self, token: int) -> FinishReason | None:
        """Why the sequence ends with a new token, if it does whatever its text is. For every token, before `push`."""
        self._left -= 1
        if token in self._end_ids:
            return "stop"
        return None if self._left else "length"

    def push(self, token: int, reason: FinishReason | None) -> tuple[str, FinishReason | None]:
        """The text that a new token adds, as far as it is certain, and why the sequence ends with it, if it does.

        Args:
            token: The new one.
            reason: What `count` has said of it.
        """
        text = "" if reason == "stop" else self._decoder.push_one(token)
        if reason:
            text += self._decoder.flush()
        if self._stops is not None:
            text, stopped = self._stops.push(text)
            if stopped:
                return text, "stop"
            if reason:
                text += self._stops.flush()
        return text, reason
