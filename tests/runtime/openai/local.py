"""Models for the API in this process: a real engine, and a double that says what a test tells it to."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterator

import uvicorn
from fastapi import FastAPI

from raygrow.infer.engine import Engine, EngineStats
from raygrow.infer.loop import EngineLoop
from raygrow.infer.request import Delta, Request
from raygrow.runtime.openai.model import Overloaded
from raygrow.text.tokenizer import Tokenizer


class LocalModel:
    """A real engine."""

    created = 1_700_000_000

    def __init__(self, id: str, engine: Engine) -> None:
        self.sparsity = engine.config.sparsity
        self.id, self.tokenizer, self.max_model_len = id, engine.tokenizer, engine.max_model_len
        self.loop = EngineLoop(engine)

    def generate(self, request: Request) -> AsyncIterator[Delta]:
        return self.loop.generate(request)

    async def check(self) -> None:
        self.loop.check()

    @property
    def stats(self) -> EngineStats:
        return self.loop.stats


class Double:
    """Says the given pieces; then ends as told. Notes what it was asked, and how many answers are being written."""

    created, sparsity = 1_700_000_000, None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.id, self.tokenizer, self.max_model_len = "double", tokenizer, 64
        self.open = 0
        self.reset()

    def reset(self) -> None:
        self.pieces, self.end, self.pause = ["Gro", "wn \u4f60", "\u597d."], "stop", 0.0
        self.asked: list[Request] = []
        self.refusals, self.well = 0, True

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        self.asked.append(request)
        if self.refusals:
            self.refusals -= 1
            raise Overloaded(retry_after=0.2)
        self.open += 1
        try:
            for piece in self.pieces:
                if self.pause:
                    await asyncio.sleep(self.pause)
                yield Delta(request.id, tuple(self.tokenizer.encode(piece)), piece)
            if self.end == "raise":
                raise RuntimeError("secret details")
            if self.end == "error":
                yield Delta(request.id, finish_reason="error", error="the replica was lost")
            elif self.end != "nothing":
                yield Delta(request.id, finish_reason="stop")
        finally:
            self.open -= 1

    async def check(self) -> None:
        if not self.well:
            raise RuntimeError("the engine is stuck")


@contextlib.contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The address of an app behind a real server."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)
