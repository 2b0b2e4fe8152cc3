"""What goes into the engine and what comes out: a request, and step by step what is new of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from raygrow.infer.sampling import Sampling

FinishReason = Literal["stop", "length", "abort", "error"]


class PromptTooLong(ValueError):
    """A prompt does not fit into what a model has room for."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to continue; several continuations of one prompt are several requests."""

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling


class Logprob(NamedTuple):
    """How likely a token was where it stands, by the model alone: before temperature, top_p and top_k."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens there and theirs, likeliest first: the same floats, so that the likeliest equals itself."""


class Delta(NamedTuple):
    """What is new of one request since its last Delta."""

    id: str
    token_ids: tuple[int, ...] = ()
    """New tokens; one that ended the sequence is among them."""
    text: str = ""
    """New text: whole characters, and nothing that may turn out to begin a stop text."""
    logprobs: tuple[Logprob, ...] = ()
    """One of each new token, where asked for."""
    prompt_logprobs: tuple[Logprob | None, ...] = ()
    """Of every token of the prompt, in the Delta that ends its prefill; the first has none."""
    finish_reason: FinishReason | None = None
    """Why the request ended; None while it goes on."""
    error: str | None = None
    cached_tokens: int = 0
    """Tokens of the prompt that were found in the cache."""


def merged(deltas: Sequence[Delta]) -> Delta:
    """Some Deltas of one request, one after the other, as one."""
    if len(deltas) == 1:
        return deltas[0]
    return deltas[-1]._replace(
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        text="".join(delta.text for delta in deltas),
        logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
        prompt_logprobs=tuple(logprob for delta in deltas for logprob in delta.prompt_logprobs),
        cached_tokens=max(delta.cached_tokens for delta in deltas),
    )
