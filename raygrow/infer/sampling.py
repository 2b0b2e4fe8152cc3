"""How the next token of a sequence is chosen, and when the sequence ends."""

from dataclasses import dataclass

MAX_LOGPROBS = 100
"""Alternatives given beside a token at most: more would make answers far larger than their text."""
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a request asks for. The names are those of vLLM's sampling parameters.

    Raises:
        ValueError: If a field is out of range; names the field and its value.
    """

    max_tokens: int = 16
    """New tokens at most. 0 only scores the prompt (see `prompt_logprobs`)."""
    temperature: float = 1.0
    """0 always takes the likeliest token (greedy)."""
    top_p: float = 1.0
    """Sample from the fewest tokens that together have this probability (arXiv 1904.09751)."""
    top_k: int = 0
    """Sample from this many of the likeliest tokens; 0 for all."""
    seed: int | None = None
    """The same seed gives the same tokens, whatever else runs beside them; None draws one."""
    stop: tuple[str, ...] = ()
    """Texts that end the sequence; they are not given out."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens, besides the end of text, that end the sequence."""
    ignore_eos: bool = False
    """The end of text is a token like any other: for measuring."""
    logprobs: int | None = None
    """Alternatives to give beside each new token: 0 for only the token's own log-probability, None for nothing."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""

    def __post_init__(self) -> None:
        _check(self.max_tokens >= 0, "max_tokens", self.max_tokens, "must not be negative")
        if self.max_tokens == 0:
            _check(
                self.prompt_logprobs is not None, "max_tokens", 0, "needs prompt_logprobs: else nothing is asked for"
            )
        _check(0 <= self.temperature < float("inf"), "temperature", self.temperature, "must be 0 (greedy) or more")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "must be above 0 and at most 1")
        _check(self.top_k >= 0, "top_k", self.top_k, "must be 0 (off) or more")
        if self.seed is not None:
            _check(-MAX_SEED <= self.seed <= MAX_SEED, "seed", self.seed, "must fit in 64 bits")
        _check(all(self.stop), "stop", self.stop, "must not hold an empty text")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            _check(count is None or 0 <= count <= MAX_LOGPROBS, name, count, f"must be 0 to {MAX_LOGPROBS}")

    @property
    def greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return self.temperature == 0


def _check(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value}: {rule}")
