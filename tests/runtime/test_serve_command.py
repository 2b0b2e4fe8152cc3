"""`raygrow serve` from its start to its end, on a Ray where Serve does not run yet."""

import asyncio
import signal
from pathlib import Path

import pytest
from ray import serve

from raygrow.data.corpus import FilesCorpus
from tests.runtime.driver import Driver, driver
from tests.runtime.serving import Answer, client, events, free_port, random_model

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def test_answers_finish_before_it_stops(ray: None, corpus: FilesCorpus, tmp_path: Path) -> None:
    model, port = random_model(tmp_path / "model", Path(corpus.path) / "tokenizer"), free_port()
    options = ["deployment_config.ray_actor_options={num_cpus: 0.5}", "ingress.num_cpus=0.5", "--port", str(port)]
    with driver(tmp_path, "serve", str(model), "--name", "tiny", *options) as server:
        server.until(lambda: f"http://localhost:{port}/v1" in server.said())
        answer = asyncio.run(stopped_in_mid_stream(server, f"http://127.0.0.1:{port}"))
        assert answer.whole, (answer, server.said())
        assert server.wait() == 0


def test_a_start_that_fails_leaves_nothing(ray: None, corpus: FilesCorpus, tmp_path: Path) -> None:
    model = random_model(tmp_path / "model", Path(corpus.path) / "tokenizer")
    options = ["deployment_config.ray_actor_options={num_cpus: 0.5}", "engine_kwargs.kv_cache_memory_bytes=1"]
    with driver(tmp_path, "serve", str(model), *options, "--port", str(free_port())) as server:
        assert server.process.wait(timeout=400) == 2  # Serve shows the traceback of the replica
        assert "raygrow: the app did not start" in server.said()
    status = serve.status()
    assert (status.proxies, status.applications) == ({}, {})


def test_a_start_that_waits_for_ever_says_why_and_can_be_stopped(
    ray: None, corpus: FilesCorpus, tmp_path: Path
) -> None:
    model, port = random_model(tmp_path / "model", Path(corpus.path) / "tokenizer"), free_port()
    wanted = "deployment_config.ray_actor_options={num_cpus: 999}"
    with driver(tmp_path, "serve", str(model), "--name", "t\u00ef/ny", wanted, "--port", str(port)) as server:
        server.until(lambda: "engine-t--ny is not ready yet." in server.said())
        server.process.send_signal(signal.SIGINT)
        assert server.wait() == 130


async def stopped_in_mid_stream(server: Driver, url: str) -> Answer:
    """An answer during which the server is told to stop."""
    answer, told = Answer(), False
    async with client() as session:
        async for _ in events(session, url, answer, model="tiny", prompt="a", max_tokens=900, ignore_eos=True):
            if answer.text and not told:
                server.process.send_signal(signal.SIGTERM)
                told = True
    return answer
