"""Token ids to text while they are still being made: no broken characters, no lost spaces, nothing beyond a stop."""

from collections.abc import Sequence
from itertools import islice, product

from raygrow.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
"""What decoders put for bytes that are no character, or not yet."""
CONTEXT = 8
LONGEST_CHARACTER = 4
"""Bytes of UTF-8, and so at most as many tokens."""
LONGEST_WINDOW = 32
"""Tokens decoded at once. Only what is no text, or nothing but spaces, comes to so many."""


class IncrementalDecoder:
    """The text of a sequence, given out as its tokens come.

    A tokenizer cannot decode token by token: a character may be spread over several tokens, and many decoders drop the
    space in front of the first token of a text. So the tokens before a new one are decoded along with it, and what may
    be the beginning of a character waits.

    Args:
        tokenizer: Decodes.
        prompt: The tokens before the first new one.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window, self._whole = _last_whole(tokenizer, prompt)
        """The tokens that are decoded again, and how many of them there are at the last point where the text is whole.

        The window begins one such point earlier, so that there is text in front of what is new.
        """
        # a character that the prompt has begun is given out as soon as it is one
        before = (tokenizer.decode(self._window[: self._whole]), tokenizer.decode(self._window).rstrip(REPLACEMENT))
        self._given = max(map(len, before))
        """Characters of the window's text that have been given out."""

    def push(self, ids: Sequence[int]) -> str:
        """The text that new tokens add, as far as it is certain."""
        return "".join([self.push_one(token) for token in ids])

    def push_one(self, token: int) -> str:
        """The text that a new token adds, as far as it is certain."""
        if self._tokenizer.is_silent(token):
            return ""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        if not text.endswith(REPLACEMENT):
            return self._give(text)
        certain = text.rstrip(REPLACEMENT)
        if len(self._window) - self._whole > LONGEST_CHARACTER:
            certain = text[:-1]  # too long for one character: these bytes are none, the last may begin one
        new = certain[self._given :]
        self._given = max(self._given, len(certain))
        self._shorten(len(text) - len(certain))
        return new

    def flush(self) -> str:
        """What was held back; for the end of a sequence."""
        return self._give(self._tokenizer.decode(self._window))

    def _give(self, text: str) -> str:
        """All that is left of a window whose text is whole; the next window begins with what is new in this one."""
        new = text[self._given :]
        window = self._window[self._whole :]
        again = self._tokenizer.decode(window)
        if again:  # without text in front of it, the next token could lose its space
            self._window, self._given = window, len(again)
        else:
            self._given = max(self._given, len(text))
            self._shorten(0)
        self._whole = len(self._window)
        return new

    def _shorten(self, uncertain: int) -> None:
        """Begins a new window in the midst of a text that does not become whole, lest ever more is decoded each time.

        Args:
            uncertain: Characters at the end of the text that have not been given out.
        """
        if len(self._window) > LONGEST_WINDOW:
            cut = len(self._window) - LONGEST_WINDOW // 2
            self._window, self._whole = self._window[cut:], max(0, self._whole - cut)
            self._given = len(self._tokenizer.decode(self._window)) - uncertain


class StopFinder:
    """Cuts a text at the first stop string, however the text is split up.

    The stop string that ends first ends the text; of two that end together, the longer.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may be given out now, and whether a stop string was found: it ends right before it.

        What may be the beginning of a stop string is held back.
        """
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """What was held back; for a sequence that ends without a stop string."""
        held, self._held = self._held, ""
        return held


def _last_whole(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[list[int], int]:
    """The last few tokens that have text, cut between characters, and how many of them are whole characters."""
    spoken = (token for token in reversed(ids) if not tokenizer.is_silent(token))
    last = list(islice(spoken, CONTEXT + LONGEST_CHARACTER))[::-1]
    for more, without in product(range(LONGEST_CHARACTER), repeat=2):
        window = last[-CONTEXT - more :]
        whole = max(0, len(window) - without)
        text = tokenizer.decode(window[:whole])
        if text == text.strip(REPLACEMENT):
            return window, whole
    return last[-CONTEXT:], min(CONTEXT, len(last))


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text that the stop string begins with."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0 and not stop.startswith(text[start:]):
        start = text.find(stop[0], start + 1)
    return len(text) - start if start >= 0 else 0
