"""A request while it is in the engine."""

import secrets

from raygrow.infer.request import Logprob, Request


class Sequence:
    """The tokens of a request, prompt and answer, and how many of them have their keys and values in a slot.

    Args:
        request: What is asked for.
        sparse: Whether tokens of the answer are sparse; those of the prompt never are.
    """

    def __init__(self, request: Request, *, sparse: bool = False) -> None:
        self.request, self.sparse = request, sparse
        self.tokens = list(request.prompt)
        self.prompt_length = len(request.prompt)
        self.slot: int | None = None
        """Its place in the key-value cache while it runs."""
        self.computed = 0
        """Tokens, from the first, whose keys and values its slot holds."""
        self.cached: int | None = None
        """Tokens of the prompt that were found in the cache; known from when it is first let in."""
        self.ended = False
        """Whether it gets no more tokens; a step that has begun may hold it all the same."""
        self._scores = request.sampling.prompt_logprobs is not None
        self.prompt_logprobs: list[Logprob | None] = [None] if self._scores else []
        """Of the prompt's tokens, as far as they have been scored; preemption does not lose them."""
        seed = request.sampling.seed
        self.seed = secrets.randbits(63) if seed is None else seed

    @property
    def missing(self) -> int:
        """Tokens to compute before the next one can be chosen: 1 while it decodes, more while it prefills."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        """Tokens that were added to the prompt."""
        return len(self.tokens) - self.prompt_length

    @property
    def unscored(self) -> int:
        """Tokens of the prompt whose log-probabilities are wanted and not known yet."""
        return self.prompt_length - len(self.prompt_logprobs) if self._scores else 0

    @property
    def reusable(self) -> int:
        """Tokens that need not be computed again if some slot holds them.

        The last token always is, for the logits of the next one. So is the one before a token that is not scored yet.
        """
        if self.unscored:
            return len(self.prompt_logprobs) - 1
        return min(len(self.tokens) - 1, self.alike)

    @property
    def alike(self) -> int:
        """Tokens, from the first, whose keys and values are those of every sequence that begins so.

        Sparse ones are not: in another sequence the same tokens may belong to the prompt.
        """
        return self.prompt_length if self.sparse else len(self.tokens)
