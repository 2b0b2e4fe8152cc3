"""The engine: requests in, tokens and text out, many sequences at a time (continuous batching)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from raygrow.infer.budget import cache_budget
from raygrow.infer.config import EngineConfig, longest_sequence
from raygrow.infer.graphs import can_record
from raygrow.infer.kv_cache import KvCache
from raygrow.infer.output import Output
from raygrow.infer.request import Delta, FinishReason, Logprob, PromptTooLong, Request
from raygrow.infer.runner import Runner
from raygrow.infer.sampler import NOT_A_NUMBER
from raygrow.infer.scheduler import Scheduler
from raygrow.infer.sequence import Sequence
from raygrow.infer.slots import Slots
from raygrow.infer.staging import on_device
from raygrow.infer.step import Step
from raygrow.nn.rack import Rack
from raygrow.sparsity.linear import SparseRows
from raygrow.text.tokenizer import Tokenizer

LARGEST_GRAPH = 512
"""Sequences: beyond this many, a step is long beside its launches."""

_NO_NUMBERS = "the model's outputs are not numbers: its weights are damaged"
_NO_ROOM = "the device has less memory left for keys and values than this sequence needs"


@dataclass(frozen=True)
class EngineStats:
    """What an engine does now, and what it has done."""

    running: int
    waiting: int
    kv_used_bytes: int
    kv_mapped_bytes: int
    kv_reclaimable_bytes: int
    kv_budget_bytes: int
    preemptions: int
    prefix_hit_tokens: int
    """Tokens of prompts that were found in the cache."""
    steps: int
    tokens: int
    """New tokens."""


@dataclass(frozen=True)
class _Running:
    sequence: Sequence
    output: Output


class _New(NamedTuple):
    """What a step has brought to a sequence."""

    sequence: Sequence
    token: int | None = None
    logprob: Logprob | None = None
    reason: FinishReason | None = None
    """Why the sequence ends, if it is known without its text."""


class Engine:
    """Continues requests. Synchronous, for one thread: `loop.EngineThread` gives it one.

    Args:
        model: In the dtype and on the device that it is to run in.
        tokenizer: Of that model.
        config: Limits.
        end_ids: Tokens that end a text; the tokenizer's when not given.
        rows: Of a sparse model, what it was made with; the engine says which tokens are sparse.

    Raises:
        ValueError: If the model is bidirectional, sequences are to be longer than it takes, or the cache's memory does
            not hold one.
    """

    def __init__(
        self,
        model: Rack,
        tokenizer: Tokenizer,
        config: EngineConfig,
        *,
        end_ids: Iterable[int] | None = None,
        rows: SparseRows | None = None,
    ) -> None:
        if model.config.attention_mode != "causal":
            raise ValueError("attention_mode=bidirectional: this model cannot generate text from left to right")
        self.tokenizer, self.config = tokenizer, config
        self._end_ids = frozenset([tokenizer.eos_id] if end_ids is None else end_ids)
        self._vocab_size = model.config.vocab_size
        self.dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
        """Of weights and cache."""
        wanted = longest_sequence(config, model.config)
        self._device, self._sparse = model.embedding.weight.device, rows is not None
        if rows is not None:  # what takes most memory, which is tried out
            rows.start, rows.stop = 0, config.max_num_seqs
        with on_device(self._device):
            self._cache = _make_cache(model, config, wanted)
        self.max_model_len = min(wanted, self._cache.max_sequence_tokens)
        """Tokens of the longest sequence, prompt and answer together."""
        if config.max_model_len is not None and self.max_model_len < wanted:
            raise ValueError(
                f"max_model_len={wanted}: kv_cache_memory_bytes={self._cache.usage.budget_bytes} holds a sequence of "
                f"{self.max_model_len} tokens; lower the one or raise the other"
            )
        graphs = min(config.max_num_seqs, LARGEST_GRAPH) if can_record(model) and not config.enforce_eager else 0
        with on_device(self._device):
            self._runner = Runner(
                model.eval(), self._cache, largest=config.max_num_batched_tokens, graphs=graphs, rows=rows
            )
        slots = Slots(self._cache, config.max_num_seqs, reuse=config.enable_prefix_caching)
        self._scheduler = Scheduler(slots, config.max_num_batched_tokens)
        self._requests: dict[str, _Running] = {}
        self._async = model.embedding.weight.is_cuda if config.async_scheduling is None else config.async_scheduling
        self._ahead: Step | None = None
        """The next step, which the device is at already. Sequences of it may have ended meanwhile."""
        self._steps = self._tokens = self._prefix_hit_tokens = 0

    def check(self, request: Request) -> None:
        """Says what is wrong with a request. May be called from any thread.

        Raises:
            ValueError: If its prompt is empty, too long, or holds a token that the model does not have.
        """
        longest = self.max_model_len - (request.sampling.max_tokens > 0)
        if not 0 < len(request.prompt) <= longest:
            wrong = PromptTooLong if request.prompt else ValueError
            raise wrong(f"the prompt has {len(request.prompt)} tokens; this model takes 1 to {longest}")
        for token in (*request.prompt, *request.sampling.stop_token_ids):
            if not 0 <= token < self._vocab_size:
                raise ValueError(f"token {token}: this model has the tokens 0 to {self._vocab_size - 1}")

    def add(self, request: Request) -> None:
        """Takes a request.

        Raises:
            ValueError: As `check`, or if its id is already in use.
        """
        self.check(request)
        if request.id in self._requests:
            raise ValueError(f"request id {request.id!r}: is already in use")
        sequence = Sequence(request, sparse=self._sparse)
        room = min(request.sampling.max_tokens, self.max_model_len - sequence.prompt_length)
        output = Output(sequence, self.tokenizer, end_ids=self._end_ids, max_tokens=room)
        self._requests[request.id] = _Running(sequence, output)
        self._scheduler.add(sequence)

    def abort(self, id: str) -> None:
        """Ends a request without another Delta; its slot is free at once. One that has ended already is no error."""
        running = self._requests.pop(id, None)
        if running is not None:
            self._scheduler.remove(running.sequence)

    def step(self) -> list[Delta]:
        """Computes one step: a token of every running sequence, and prompts as far as the budget goes.

        With `async_scheduling` the device goes on to the next step while texts are made of this one's tokens.

        Returns:
            What is new of each request that has something new.
        """
        with on_device(self._device):
            step = self._ahead or self._begin()
            self._ahead = None
            if step is None:  # nobody runs: who has waited longest finds no room although all of it is free
                return [self._end(sequence, error=_NO_ROOM) for sequence in list(self._scheduler.waiting)[:1]]
            news = self._take(step)
            if self._async:
                self._ahead = self._begin()
            return [self._tell(new) for new in news]

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self._requests)

    @property
    def stats(self) -> EngineStats:
        """Numbers of now."""
        usage = self._cache.usage
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            kv_used_bytes=usage.used_bytes,
            kv_mapped_bytes=usage.mapped_bytes,
            kv_reclaimable_bytes=usage.reclaimable_bytes,
            kv_budget_bytes=usage.budget_bytes,
            preemptions=self._scheduler.preemptions,
            prefix_hit_tokens=self._prefix_hit_tokens,
            steps=self._steps,
            tokens=self._tokens,
        )

    def reclaim(self) -> int:
        """Gives the memory of ended sequences back now. Returns its bytes."""
        return self._cache.reclaim()

    def close(self) -> None:
        """Gives all memory of the cache back to the device; the engine must not be used any more. Twice is as once."""
        self._ahead = None
        self._cache.close()

    def _begin(self) -> Step | None:
        """Has the device compute a step. None if there is nothing that could be computed."""
        chunks = self._scheduler.schedule()
        if not chunks:
            return None
        self._steps += 1
        return Step(chunks, self._runner.run(chunks))

    def _take(self, step: Step) -> list[_New]:
        """Gives sequences the tokens of a step when they are there, and ends those that end whatever their text is."""
        news = [_New(sequence, reason="length") for sequence in step.scored if not sequence.ended]
        for sequence, token, logprob in step.take():
            if token == NOT_A_NUMBER:
                news.append(_New(sequence, reason="error"))
                continue
            sequence.tokens.append(token)
            self._tokens += 1
            reason = self._requests[sequence.request.id].output.count(token)
            news.append(_New(sequence, token, logprob, reason))
        for new in news:
            if new.reason:
                self._scheduler.remove(new.sequence)
        return news

    def _tell(self, new: _New) -> Delta:
        """What is new of a request, its text included."""
        sequence, id = new.sequence, new.sequence.request.id
        if new.token is None:
            del self._requests[id]
            return _last(sequence, new.reason or "error", error=_NO_NUMBERS if new.reason == "error" else None)
        first = sequence.generated == 1
        text, reason = self._requests[id].output.push(new.token, new.reason)
        if first:
            self._prefix_hit_tokens += sequence.cached or 0
        if reason:
            del self._requests[id]
            if not new.reason:  # a stop text: the device may be at its next token, which nobody will ask for
                self._scheduler.remove(sequence)
        return Delta(
            id,
            (new.token,),
            text,
            logprobs=() if new.logprob is None else (new.logprob,),
            prompt_logprobs=tuple(sequence.prompt_logprobs) if first else (),
            finish_reason=reason,
            cached_tokens=sequence.cached or 0,
        )

    def _end(self, sequence: Sequence, *, error: str) -> Delta:
        """Ends a request that cannot go on."""
        self.abort(sequence.request.id)
        return _last(sequence, "error", error=error)


def _last(sequence: Sequence, reason: FinishReason, *, error: str | None) -> Delta:
    """The end of a request, without a new token."""
    return Delta(
        sequence.request.id,
        prompt_logprobs=() if sequence.generated else tuple(sequence.prompt_logprobs),
        finish_reason=reason,
        error=error,
        cached_tokens=sequence.cached or 0,
    )


def _make_cache(model: Rack, config: EngineConfig, max_tokens: int) -> KvCache:
    weight = model.embedding.weight
    best = "interleaved" if weight.is_cuda else "block"
    try:
        return KvCache(
            model.config,
            slots=config.max_num_seqs,
            max_tokens=max_tokens,
            dtype=weight.dtype,
            device=weight.device,
            budget_bytes=cache_budget(model, config, max_tokens),
            layout=best if config.kv_layout == "auto" else config.kv_layout,
        )
    except ValueError as error:
        raise ValueError(f"kv_cache_memory_bytes={config.kv_cache_memory_bytes}: {error}") from error
