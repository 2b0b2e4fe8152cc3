"""Answers in OpenAI's shapes: completions and chats, whole and as chunks of a stream."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from raygrow.infer.request import Delta, Logprob
from raygrow.text.decoding import IncrementalDecoder
from raygrow.text.token_bytes import TokenBytes
from raygrow.text.tokenizer import Tokenizer

Json = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """What an answer goes on from."""

    ids: tuple[int, ...]
    text: str
    """As the client wrote it, where it was a text."""


class Shape(Protocol):
    """How an answer is written. Keeps what it needs to know of each choice between its pieces."""

    prefix: str
    """Of ids."""
    whole: str
    """Name of the object that is one answer."""
    chunk: str
    """Name of the objects of a stream."""
    param: str
    """The client's field that prompts are from."""

    def choice(self, index: int, delta: Delta) -> Json:
        """All of one choice."""
        ...

    def piece(self, index: int, delta: Delta) -> Json | None:
        """What is new of one choice; None when there is nothing to show."""
        ...


class CompletionShape:
    """Plain text, with OpenAI's older form of log-probabilities.

    Args:
        tokenizer: Of the model.
        prompts: Of each choice.
        echo: Begin with the prompt.
        logprobs: Whether they are asked for.
    """

    prefix, whole, chunk, param = "cmpl", "text_completion", "text_completion", "prompt"

    def __init__(self, tokenizer: Tokenizer, prompts: Sequence[Prompt], *, echo: bool, logprobs: bool) -> None:
        self._prompts, self._echo = prompts, echo
        self._begun: set[int] = set()
        self._logprobs = [_TextLogprobs(tokenizer, prompt, echo=echo) for prompt in prompts] if logprobs else None

    def choice(self, index: int, delta: Delta) -> Json:
        """See Shape."""
        text = delta.text
        if self._echo and index not in self._begun:
            text = self._prompts[index].text + text
        self._begun.add(index)
        logprobs = self._logprobs[index].add(delta) if self._logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": delta.finish_reason}

    def piece(self, index: int, delta: Delta) -> Json | None:
        """See Shape."""
        choice = self.choice(index, delta)
        shown = choice["text"] or choice["finish_reason"] or self._logprobs
        return choice if shown else None


class ChatShape:
    """Turns of a conversation.

    Args:
        tokenizer: Of the model.
        logprobs: Whether they are asked for.
    """

    prefix, whole, chunk, param = "chatcmpl", "chat.completion", "chat.completion.chunk", "messages"

    def __init__(self, tokenizer: Tokenizer, *, logprobs: bool) -> None:
        self._bytes = TokenBytes(tokenizer) if logprobs else None
        self._begun: set[int] = set()

    def choice(self, index: int, delta: Delta) -> Json:
        """See Shape."""
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return self._with_rest(index, delta, {"message": message})

    def piece(self, index: int, delta: Delta) -> Json | None:
        """See Shape."""
        new: Json = {"content": delta.text} if delta.text else {}
        if index not in self._begun:
            self._begun.add(index)
            new = {"role": "assistant", "content": delta.text}
        shown = new or delta.finish_reason or self._bytes
        return self._with_rest(index, delta, {"delta": new}) if shown else None

    def _with_rest(self, index: int, delta: Delta, content: Json) -> Json:
        logprobs = None
        if self._bytes:
            logprobs = {"content": [self._token(self._bytes, entry) for entry in delta.logprobs], "refusal": None}
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": delta.finish_reason}

    @staticmethod
    def _token(bytes_of: TokenBytes, entry: Logprob) -> Json:
        def named(id: int, logprob: float) -> Json:
            return {"token": bytes_of.text(id), "logprob": finite(logprob), "bytes": list(bytes_of(id))}

        top = [named(id, logprob) for id, logprob in entry.top]
        return {**named(entry.token_id, entry.logprob), "top_logprobs": top}


class Answer:
    """What all chunks of an answer share.

    Args:
        shape: How choices are written.
        model: The model's name.
        name: Makes the answer's id.
    """

    def __init__(self, shape: Shape, *, model: str, name: str) -> None:
        self._shape = shape
        self._head = {"id": f"{shape.prefix}-{name}", "created": int(time.time()), "model": model}

    def whole(self, deltas: Mapping[int, Delta], usage: Json) -> Json:
        """A whole answer."""
        choices = [self._shape.choice(index, delta) for index, delta in sorted(deltas.items())]
        return {**self._head, "object": self._shape.whole, "choices": choices, "usage": usage}

    def chunks(self, deltas: Mapping[int, Delta]) -> list[Json]:
        """What is new, a chunk for each choice that has anything to show."""
        pieces = (self._shape.piece(index, delta) for index, delta in deltas.items())
        return [{**self._head, "object": self._shape.chunk, "choices": [piece]} for piece in pieces if piece]

    def usage_chunk(self, usage: Json) -> Json:
        """The last one: clients read a count of tokens only from a chunk without choices."""
        return {**self._head, "object": self._shape.chunk, "choices": [], "usage": usage}


class Usage:
    """Counts the tokens of an answer.

    Args:
        prompt_tokens: Of all prompts, each once.
    """

    def __init__(self, prompt_tokens: int) -> None:
        self._prompt, self._new = prompt_tokens, 0
        self._cached: dict[int, int] = {}

    def add(self, deltas: Mapping[int, Delta]) -> None:
        """Counts what is new."""
        for index, delta in deltas.items():
            self._new += len(delta.token_ids)
            self._cached[index] = max(self._cached.get(index, 0), delta.cached_tokens)

    @property
    def body(self) -> Json:
        """As JSON."""
        cached = min(self._prompt, sum(self._cached.values()))
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._new,
            "total_tokens": self._prompt + self._new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class _TextLogprobs:
    """OpenAI's older form: parallel lists of tokens, their log-probabilities, alternatives, and places in the text."""

    def __init__(self, tokenizer: Tokenizer, prompt: Prompt, *, echo: bool) -> None:
        self._bytes = TokenBytes(tokenizer)
        self._prompt, self._echo = prompt, echo
        self._decoder = IncrementalDecoder(tokenizer, () if echo else prompt.ids)
        self._special = {id: text for text, id in tokenizer.special_tokens.items()}
        self._offset = 0

    def add(self, delta: Delta) -> Json:
        entries: list[tuple[int, Logprob | None]] = [(entry.token_id, entry) for entry in delta.logprobs]
        if self._echo and delta.prompt_logprobs:
            entries = [*zip(self._prompt.ids, delta.prompt_logprobs, strict=True), *entries]
        return {
            "tokens": [self._bytes.text(id) for id, _ in entries],
            "token_logprobs": [None if entry is None else finite(entry.logprob) for _, entry in entries],
            "top_logprobs": [None if entry is None else self._alternatives(entry) for _, entry in entries],
            "text_offset": [self._place(id) for id, _ in entries],
        }

    def _alternatives(self, entry: Logprob) -> dict[str, float]:
        found: dict[str, float] = {}
        for id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            found.setdefault(self._bytes.text(id), finite(logprob))  # of two that read alike, the likelier
        return found

    def _place(self, id: int) -> int:
        offset = self._offset
        self._offset += len(self._decoder.push([id]))
        spelled = self._special.get(id)
        if spelled and self._echo and self._prompt.text.startswith(spelled, offset):
            self._offset += len(spelled)  # no decoder gives it, but the client wrote it, and gets it back
        return offset


def finite(logprob: float) -> float:
    """JSON has no infinity: what is impossible is only very unlikely."""
    return max(logprob, -9999.0)
