"""What the API asks of a model: an engine in this process, or replicas of one elsewhere."""

from collections.abc import AsyncIterator
from typing import Protocol

from raygrow.infer.request import Delta, Request
from raygrow.text.tokenizer import Tokenizer


class Overloaded(Exception):
    """There is no room for another request now.

    Args:
        retry_after: Seconds after which to ask again.
    """

    def __init__(self, *, retry_after: float = 1.0) -> None:
        super().__init__(f"too many requests; try again in {retry_after:g} s")
        self.retry_after = retry_after


class Model(Protocol):
    """A model that answers requests."""

    id: str
    """What clients call it."""
    tokenizer: Tokenizer
    max_model_len: int
    """Tokens of a prompt and its answer together, at most."""
    sparsity: float | None
    """Share of the Blocks' weights that tokens of its answers skip; None for a dense model."""
    created: int
    """Seconds since 1970."""

    def generate(self, request: Request) -> AsyncIterator[Delta]:
        """The answer in pieces, until one has a `finish_reason`. Closing the iterator aborts the request.

        Raises:
            Overloaded: Before the first piece, if there is no room.
            ValueError: Before the first piece, if the model cannot continue this prompt.
        """
        ...

    async def check(self) -> None:
        """Raises if the model cannot answer any more."""
        ...
