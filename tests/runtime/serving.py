"""Clients of a served model: plain HTTP, many at once, and a look at the processes behind it."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from ray import serve

from raygrow.nn.config import ModelConfig
from raygrow.nn.init import init_weights
from raygrow.nn.rack import Rack
from raygrow.weights.folder import write_folder

APP = "raygrow"
POLL_SECONDS = 0.05


def random_model(folder: Path, tokenizer: Path, *, seed: int = 0) -> Path:
    """A small model that has learned nothing: its samples differ all the more."""
    config = ModelConfig(
        vocab_size=512, d_model=32, n_heads=4, n_kv_heads=2, d_ff=64, blocks_per_stack=2, max_seq_len=1024
    )
    model = Rack(config)
    init_weights(model, config, seed=seed)
    return write_folder(folder, config, model.state_dict().items(), tokenizer_from=tokenizer)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Answer:
    """What one streamed request came to."""

    status: int = 0
    text: str = ""
    finish_reason: str | None = None
    error: dict[str, Any] | None = None
    done: bool = False
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether it came to its proper end."""
        return self.status == 200 and self.done and self.error is None and self.finish_reason is not None


async def events(session: aiohttp.ClientSession, url: str, answer: Answer, **body: Any) -> AsyncIterator[Answer]:
    """Streams a completion; gives the answer so far after each event."""
    async with session.post(f"{url}/v1/completions", json={"stream": True, **body}) as response:
        answer.status, answer.headers = response.status, dict(response.headers)
        if response.status != 200:
            answer.error = (await response.json())["error"]
            return
        async for line in response.content:
            data = line.decode().removeprefix("data:").strip()
            if data == "[DONE]":
                answer.done = True
            elif data:
                event = json.loads(data)
                answer.error = event.get("error")
                for choice in event.get("choices", ()):
                    answer.text += choice["text"]
                    answer.finish_reason = choice["finish_reason"] or answer.finish_reason
            yield answer


async def complete(session: aiohttp.ClientSession, url: str, **body: Any) -> Answer:
    """Streams a completion to its end."""
    answer = Answer()
    async for _ in events(session, url, answer, **body):
        pass
    return answer


def client() -> aiohttp.ClientSession:
    """A session for any number of connections."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=120))


async def until(condition: Callable[[], Any], *, seconds: float) -> Any:
    """Waits for something to come true, while others go on; gives its value."""
    deadline = time.monotonic() + seconds
    while not (value := await asyncio.to_thread(condition)):
        assert time.monotonic() < deadline, f"still {value!r} after {seconds} s"
        await asyncio.sleep(POLL_SECONDS)
    return value


def replicas(model: str) -> int:
    """Replicas of a model that run."""
    return serve.status().applications[APP].deployments[f"engine-{model}"].replica_states.get("RUNNING", 0)


def replica_processes(model: str) -> list[psutil.Process]:
    """The processes of a model's replicas, on the Ray that this test session has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and f"ServeReplica:{APP}:engine-{model}" in process.cmdline()[0]:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def load(model: str) -> tuple[float, float]:
    """Sequences that run, and that wait, on some replica of a model."""
    handle = serve.get_deployment_handle(f"engine-{model}", APP)
    stats = handle.record_autoscaling_stats.remote().result(timeout_s=10)
    return stats["running"], stats["waiting"]
