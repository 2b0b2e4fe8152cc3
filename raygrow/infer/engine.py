"""The engine: requests in, tokens and text out, many sequences at a time (continuous batching)."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from raygrow.infer.budget import cache_budget
from raygrow.infer.config import EngineConfig
from raygrow.infer.graphs import can_record
from raygrow.infer.kv_cache import KvCache
from raygrow.infer.output import Output
from raygrow.infer.request import Delta, FinishReason, Logprob, Request
from raygrow.infer.runner import Runner
from raygrow.infer.sampler import NOT_A_NUMBER, choose_tokens, logprobs
from raygrow.infer.scheduler import Chunk, Scheduler
from raygrow.infer.sequence import Sequence
from raygrow.infer.slots import Slots
from raygrow.nn.rack import Rack
from raygrow.text.tokenizer import Tokenizer, load_tokenizer
from raygrow.weights.folder import finished_model, load_model
from raygrow.weights.json_file import read_json

logger = logging.getLogger(__name__)

LARGEST_GRAPH = 512
"""Sequences: beyond this many, a step is long beside its launches."""

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


class Engine:
    """Continues requests. Synchronous, for one thread: `loop.EngineLoop` gives it one.

    Args:
        model: In the dtype and on the device that it is to run in.
        tokenizer: Of that model.
        config: Limits.
        end_ids: Tokens that end a text; the tokenizer's when not given.

    Raises:
        ValueError: If the model is bidirectional, or the cache's memory does not hold one sequence.
    """

    def __init__(
        self, model: Rack, tokenizer: Tokenizer, config: EngineConfig, *, end_ids: Iterable[int] | None = None
    ) -> None:
        if model.config.attention_mode != "causal":
            raise ValueError("attention_mode=bidirectional: this model cannot generate text from left to right")
        self.tokenizer, self.config = tokenizer, config
        self._end_ids = frozenset([tokenizer.eos_id] if end_ids is None else end_ids)
        self._vocab_size = model.config.vocab_size
        wanted = config.max_model_len or model.config.max_seq_len
        self._cache = _make_cache(model, config, wanted)
        self.max_model_len = min(wanted, self._cache.max_sequence_tokens)
        """Tokens of the longest sequence, prompt and answer together."""
        if config.max_model_len is not None and self.max_model_len < wanted:
            raise ValueError(
                f"max_model_len={wanted}: kv_cache_memory_bytes={self._cache.usage.budget_bytes} holds a sequence of "
                f"{self.max_model_len} tokens; lower the one or raise the other"
            )
        graphs = min(config.max_num_seqs, LARGEST_GRAPH) if can_record(model) and not config.enforce_eager else 0
        self._runner = Runner(model.eval(), self._cache, graphs=graphs)
        slots = Slots(self._cache, config.max_num_seqs, reuse=config.enable_prefix_caching)
        self._scheduler = Scheduler(slots, config.max_num_batched_tokens)
        self._requests: dict[str, _Running] = {}
        self._steps = self._tokens = self._prefix_hit_tokens = 0

    def check(self, request: Request) -> None:
        """Says what is wrong with a request. May be called from any thread.

        Raises:
            ValueError: If its prompt is empty, too long, or holds a token that the model does not have.
        """
        longest = self.max_model_len - (request.sampling.max_tokens > 0)
        if not 0 < len(request.prompt) <= longest:
            raise ValueError(f"the prompt has {len(request.prompt)} tokens; this model takes 1 to {longest}")
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
        sequence = Sequence(request)
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

        Returns:
            What is new of each request that has something new.
        """
        chunks = self._scheduler.schedule()
        if not chunks:  # nobody runs: who has waited longest finds no room although all of it is free
            return [self._end(sequence, "error", error=_NO_ROOM) for sequence in list(self._scheduler.waiting)[:1]]
        logits_LV = self._runner.run(chunks)
        self._steps += 1
        completed = self._settle(chunks, logits_LV)
        sampled = [(sequence, row) for sequence, row in completed if sequence.request.sampling.max_tokens]
        tokens = self._choose(sampled, logits_LV)
        found = _new_logprobs(sampled, tokens, logits_LV)
        scored = [
            self._end(sequence, "length") for sequence, _ in completed if not sequence.request.sampling.max_tokens
        ]
        pushed = zip(sampled, tokens, found, strict=True)
        return scored + [self._push(sequence, token, logprob) for (sequence, _), token, logprob in pushed]

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
        """Gives all memory of the cache back to the device; the engine must not be used any more."""
        self._cache.close()

    def _settle(self, chunks: list[Chunk], logits_LV: Tensor) -> list[tuple[Sequence, int]]:
        """Notes that chunks are computed, and scores prompts.

        Returns:
            The sequences whose next token can be chosen, each with its row of the logits.
        """
        completed, scores, row = [], [], 0
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.unscored:
                targets = range(
                    max(chunk.start + 1, len(sequence.prompt_logprobs)), min(chunk.stop + 1, sequence.prompt_length)
                )
                scores += [(sequence, target, row + target - 1 - chunk.start) for target in targets]
            row += len(chunk.wanted)
            if chunk.completes:
                completed.append((sequence, row - 1))
            sequence.computed = chunk.stop
        if scores:
            tokens = [sequence.tokens[target] for sequence, target, _ in scores]
            counts = [sequence.request.sampling.prompt_logprobs or 0 for sequence, _, _ in scores]
            found = logprobs(logits_LV[[row for _, _, row in scores]], tokens, counts)
            for (sequence, _, _), logprob in zip(scores, found, strict=True):
                sequence.prompt_logprobs.append(logprob)
        return completed

    def _choose(self, sampled: list[tuple[Sequence, int]], logits_LV: Tensor) -> list[int]:
        if not sampled:
            return []
        if len(sampled) < len(logits_LV):
            logits_LV = logits_LV[[row for _, row in sampled]]
        return choose_tokens(
            logits_LV,
            [sequence.request.sampling for sequence, _ in sampled],
            [sequence.seed for sequence, _ in sampled],
            [sequence.generated for sequence, _ in sampled],
        )

    def _push(self, sequence: Sequence, token: int, logprob: Logprob | None) -> Delta:
        """Adds a token to a sequence and says what is new."""
        if token == NOT_A_NUMBER:
            return self._end(sequence, "error", error="the model's outputs are not numbers: its weights are damaged")
        first = not sequence.generated
        sequence.tokens.append(token)
        self._tokens += 1
        text, reason = self._requests[sequence.request.id].output.push(token)
        delta = Delta(
            sequence.request.id,
            (token,),
            text,
            logprobs=() if logprob is None else (logprob,),
            prompt_logprobs=tuple(sequence.prompt_logprobs) if first else (),
            finish_reason=reason,
            cached_tokens=sequence.cached or 0,
        )
        if first:
            self._prefix_hit_tokens += delta.cached_tokens
        if reason:
            self.abort(sequence.request.id)
        return delta

    def _end(self, sequence: Sequence, reason: FinishReason, *, error: str | None = None) -> Delta:
        """Ends a request without a new token."""
        self.abort(sequence.request.id)
        return Delta(
            sequence.request.id,
            prompt_logprobs=() if sequence.generated else tuple(sequence.prompt_logprobs),
            finish_reason=reason,
            error=error,
            cached_tokens=sequence.cached or 0,
        )


def _new_logprobs(sampled: list[tuple[Sequence, int]], tokens: list[int], logits_LV: Tensor) -> list[Logprob | None]:
    """Of the chosen tokens, where they are asked for."""
    found: list[Logprob | None] = [None] * len(sampled)
    counts = [sequence.request.sampling.logprobs for sequence, _ in sampled]
    asked = [i for i, count in enumerate(counts) if count is not None and tokens[i] != NOT_A_NUMBER]
    if asked:
        rows = logits_LV[[sampled[i][1] for i in asked]]
        given = logprobs(rows, [tokens[i] for i in asked], [counts[i] or 0 for i in asked])
        for i, logprob in zip(asked, given, strict=True):
            found[i] = logprob
    return found


def _make_cache(model: Rack, config: EngineConfig, max_tokens: int) -> KvCache:
    weight = model.embedding.weight
    try:
        return KvCache(
            model.config,
            slots=config.max_num_seqs,
            max_tokens=max_tokens,
            dtype=weight.dtype,
            device=weight.device,
            budget_bytes=cache_budget(model, config, max_tokens),
            layout="block" if config.kv_layout == "auto" else config.kv_layout,
        )
    except ValueError as error:
        raise ValueError(f"kv_cache_memory_bytes={config.kv_cache_memory_bytes}: {error}") from error


def load_engine(folder: str | Path, config: EngineConfig | None = None) -> Engine:
    """The engine of a model folder, raygrow's or Hugging Face's, or of a finished run.

    Raises:
        FileNotFoundError: If the folder, its tensors or its tokenizer are missing.
        ValueError: If a file is damaged, or the model cannot generate.
    """
    config = config or EngineConfig()
    folder = finished_model(folder)
    tokenizer = load_tokenizer(folder)
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    logger.info("loading %s on %s", folder, device)
    dtype = (
        getattr(torch, config.dtype) if config.dtype != "auto" else torch.bfloat16 if device.type == "cuda" else None
    )
    model = load_model(folder, dtype=dtype, device=device)
    return Engine(model, tokenizer, config, end_ids={tokenizer.eos_id, *_end_ids(folder)})


def _end_ids(folder: Path) -> list[int]:
    """Further tokens that end a text: chat models of Hugging Face name several."""
    file = folder / "generation_config.json"
    ids = read_json(file).get("eos_token_id") if file.exists() else None
    return ids if isinstance(ids, list) else [] if ids is None else [ids]
