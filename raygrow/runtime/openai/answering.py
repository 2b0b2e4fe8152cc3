"""One call of a client as one or more requests to a model, whose answers come back together."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import cast

from raygrow.infer.request import Delta, PromptTooLong, Request, merged
from raygrow.runtime.openai.errors import ApiError
from raygrow.runtime.openai.metrics import Metrics
from raygrow.runtime.openai.model import Model


async def answer(
    model: Model, requests: Sequence[Request], metrics: Metrics, *, param: str
) -> AsyncGenerator[dict[int, Delta]]:
    """What is new of the answers, by the number of the request, until all have ended.

    Whatever has arrived since the last time comes together, one Delta of each: a reader who is slower than the model
    gets fewer and larger pieces. Closing the iterator aborts what has not ended.

    Args:
        model: Answers.
        requests: One of each answer.
        metrics: Where times are noted.
        param: The client's field that the prompts are from.

    Raises:
        ApiError: If an answer ends in an error, or without an end, or the model refuses a prompt.
        Exception: What the model raises.
    """
    arrived: asyncio.Queue[tuple[int, Delta | Exception]] = asyncio.Queue()

    async def read(index: int, request: Request) -> None:
        try:
            async with aclosing(_measured(model, request, metrics)) as deltas:
                async for delta in deltas:
                    arrived.put_nowait((index, delta))
        except ValueError as error:
            code = "context_length_exceeded" if isinstance(error, PromptTooLong) else None
            arrived.put_nowait((index, ApiError(f"{param}: {error}", param=param, code=code)))
        except Exception as error:
            arrived.put_nowait((index, error))

    readers = [asyncio.create_task(read(index, request)) for index, request in enumerate(requests)]
    left = len(requests)
    try:
        while left:
            items = [await arrived.get()]
            while not arrived.empty():
                items.append(arrived.get_nowait())
            pieces: dict[int, list[Delta]] = {}
            for index, item in items:
                if isinstance(item, Delta):
                    pieces.setdefault(index, []).append(item)
                    left -= item.finish_reason is not None
            if pieces:
                yield {index: merged(deltas) for index, deltas in sorted(pieces.items())}
            for _, item in items:
                if isinstance(item, Exception):
                    raise item
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def _measured(model: Model, request: Request, metrics: Metrics) -> AsyncGenerator[Delta]:
    """A model's answer to one request; errors in it are raised, and its times are noted.

    Raises:
        ValueError: If the model cannot continue the prompt.
    """
    began, first, tokens = time.perf_counter(), None, 0
    metrics.open.labels(model.id).inc()
    try:
        async with aclosing(cast(AsyncGenerator[Delta], model.generate(request))) as deltas:
            async for delta in deltas:
                if delta.finish_reason in ("error", "abort"):
                    if delta.text:  # what came before the end is the client's all the same
                        yield delta._replace(finish_reason=None, error=None)
                    raise _lost(delta.error or "the server stopped before the answer was finished")
                if first is None and delta.token_ids:
                    first = time.perf_counter()
                    metrics.first_token.labels(model.id).observe(first - began)
                    metrics.prompt_tokens.labels(model.id).inc(len(request.prompt))
                tokens += len(delta.token_ids)
                metrics.new_tokens.labels(model.id).inc(len(delta.token_ids))
                yield delta
                if delta.finish_reason is not None:
                    if first is not None and tokens > 1:
                        mean = (time.perf_counter() - first) / (tokens - 1)
                        metrics.next_token.labels(model.id).observe(mean)
                    return
        raise _lost("the answer ended before it was finished; ask again")
    finally:
        metrics.open.labels(model.id).dec()


def _lost(reason: str) -> ApiError:
    """What becomes of an answer whose engine is gone. Another one may be there, so clients may ask again."""
    return ApiError(reason, status=503, code="answer_lost", headers={"retry-after": "1"})
