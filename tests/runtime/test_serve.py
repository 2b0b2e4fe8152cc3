"""Served models under load and under faults: nothing lost or mixed up, and what is lost is told."""

import asyncio
import json
import re
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import ray
from ray import serve

from raygrow.data.corpus import FilesCorpus
from raygrow.infer.config import EngineConfig
from raygrow.infer.load import load_engine
from raygrow.infer.request import Request
from raygrow.infer.sampling import Sampling
from raygrow.runtime.serve import APP, build
from tests.runtime.driver import driver
from tests.runtime.serving import (
    Answer,
    client,
    complete,
    events,
    free_port,
    load,
    random_model,
    replica_processes,
    replicas,
    until,
)
from tests.sparsity.plans import add_plan

pytestmark = [pytest.mark.slow, pytest.mark.ray]
QUICK_SCALING = {"look_back_period_s": 3, "upscale_delay_s": 1, "downscale_delay_s": 2, "downscale_to_zero_delay_s": 2}
CPUS = 0.5
LONG = 900
"""Tokens of an answer that takes seconds."""


@pytest.fixture(scope="module")
def model(corpus: FilesCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("models") / "small", Path(corpus.path) / "tokenizer")


@pytest.fixture(scope="module")
def url(ray: None) -> Iterator[str]:
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def described(model: Path, *, name: str = "small", engine: dict[str, Any] | None = None, **deployment: Any) -> dict:
    """One of `llm_configs`."""
    return {
        "model_loading_config": {"model_id": name, "model_source": str(model)},
        "engine_kwargs": engine or {},
        "deployment_config": {
            "ray_actor_options": {"num_cpus": CPUS},
            "health_check_period_s": 1,
            "graceful_shutdown_timeout_s": 60,
            **deployment,
        },
    }


@pytest.fixture
def deploy(url: str) -> Iterator[Callable[..., str]]:
    """Starts an app of models; it goes when the test has ended."""

    def start(*models: dict) -> str:
        args = {"llm_configs": list(models), "ingress": {"num_cpus": CPUS}}
        serve.run(build(args), name=APP, route_prefix="/")
        return url

    yield start
    serve.delete(APP)


def alone(model: Path, bodies: list[dict[str, Any]], *, sparsity: float | None = None) -> list[str]:
    """What each request comes to when nothing else runs: one after the other, in this process."""
    engine = load_engine(model, EngineConfig(max_num_seqs=1, enable_prefix_caching=False, sparsity=sparsity))
    texts = []
    for i, body in enumerate(bodies):
        sampling = Sampling(max_tokens=body["max_tokens"], temperature=body["temperature"], seed=body["seed"])
        prompt = tuple(engine.tokenizer.encode(body["prompt"], special_tokens=True))
        engine.add(Request(id=str(i), prompt=prompt, sampling=sampling))
        texts.append("")
        while engine.has_work:
            texts[-1] += "".join(delta.text for delta in engine.step())
    return texts


def test_hundreds_of_streams_are_not_mixed_up(deploy: Callable[..., str], model: Path) -> None:
    url = deploy(described(model, engine={"max_num_seqs": 64}, max_ongoing_requests=600))
    bodies = [
        {"prompt": f"def stream_{i}(", "temperature": min(1, i % 8), "seed": i, "max_tokens": 8 + i % 17}
        for i in range(500)
    ]

    async def all_at_once() -> list[Answer]:
        async with client() as session:
            return await asyncio.gather(*(complete(session, url, model="small", **body) for body in bodies))

    answers = asyncio.run(all_at_once())
    assert all(answer.whole for answer in answers), [answer for answer in answers if not answer.whole][:3]
    expected = alone(model, bodies)
    assert len(set(expected)) > 400
    differ = [(answer.text, text) for answer, text in zip(answers, expected, strict=True) if answer.text != text]
    # who is mixed up is not alone; a draw may fall on the border of two tokens, which rounding in company moves
    assert len(differ) < 2, differ
    assert load("small") == (0, 0)
    assert metric("raygrow_engine_tokens", "engine-small") > 0


def test_questions_and_answers_of_megabytes_arrive(deploy: Callable[..., str], model: Path) -> None:
    url = deploy(described(model, engine={"max_num_seqs": 64}))
    many = {"prompt": "def f(", "max_tokens": LONG, "n": 64, "logprobs": 5, "ignore_eos": True, "stream": False}
    long = {"prompt": "x = 1\n" * 590_000, "stream": False}

    async def ask(body: dict[str, Any]) -> tuple[int, bytes]:
        async with client() as session, session.post(f"{url}/v1/completions", json=body) as response:
            return response.status, await response.read()

    status, answer = asyncio.run(ask(many))
    assert status == 200
    assert len(answer) > 4 * 2**20
    assert [len(choice["logprobs"]["tokens"]) for choice in json.loads(answer)["choices"]] == [LONG] * 64
    status, answer = asyncio.run(ask(long))
    assert status == 400
    assert json.loads(answer)["error"]["code"] == "context_length_exceeded"


def metric(name: str, deployment: str) -> float:
    """A figure of one replica, as Prometheus would read it from this node."""
    port = ray.nodes()[0]["MetricsExportPort"]
    pattern = re.compile(rf'^ray_{name}{{.*deployment="{deployment}".*replica="\w+".*}} (\S+)$', re.MULTILINE)
    deadline = time.monotonic() + 30
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            found = pattern.findall(answer.read().decode())
        if found and float(found[-1]) > 0:
            return float(found[-1])
        assert time.monotonic() < deadline, f"{name} of {deployment} is not among Ray's metrics"
        time.sleep(1)


@pytest.mark.parametrize("only_its_engine", [False, True])
def test_a_killed_replica_is_told_and_replaced(deploy: Callable[..., str], model: Path, only_its_engine: bool) -> None:
    url = deploy(described(model))

    async def kill_in_mid_stream() -> tuple[Answer, Answer]:
        async with client() as session:
            cut, body = Answer(), {"model": "small", "prompt": "def "}
            async for _ in events(session, url, cut, **body, max_tokens=LONG, ignore_eos=True):
                if cut.text and (processes := replica_processes("small")):
                    for process in processes:
                        for victim in process.children() if only_its_engine else [process]:
                            victim.kill()
            after, end = await complete(session, url, **body, max_tokens=8), time.monotonic() + 60
            while only_its_engine and not after.whole:  # until the next health check
                assert after.status == 503
                assert time.monotonic() < end
                await asyncio.sleep(0.2)
                after = await complete(session, url, **body, max_tokens=8)
            return cut, after

    cut, after = asyncio.run(kill_in_mid_stream())
    assert cut.text
    assert cut.error
    assert set(cut.error) == {"message", "type", "param", "code"}
    assert ("its process has ended" if only_its_engine else "lost") in cut.error["message"]
    assert after.whole, after


def test_a_replica_that_hangs_is_replaced(deploy: Callable[..., str], model: Path) -> None:
    url = deploy(described(model, health_check_timeout_s=1, graceful_shutdown_timeout_s=1))
    (process,) = replica_processes("small")
    process.send_signal(signal.SIGSTOP)

    async def ask() -> Answer:
        async with client() as session:
            await until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, seconds=60)
            return await complete(session, url, model="small", prompt="def ", max_tokens=8)

    assert asyncio.run(ask()).whole


def test_clients_that_vanish_free_their_slots(deploy: Callable[..., str], model: Path) -> None:
    url = deploy(described(model, engine={"max_num_seqs": 2}))

    async def vanish() -> float:
        async with client() as session:
            for _ in range(3):  # one more than there are slots
                answer = Answer()
                stream = events(session, url, answer, model="small", prompt="a", max_tokens=LONG, ignore_eos=True)
                await anext(stream)
                assert sum(await asyncio.to_thread(load, "small")) == 1
                await session._connector.close()  # the sockets, not the requests: nobody says goodbye
                left = time.monotonic()
                await until(lambda: load("small") == (0, 0), seconds=1)
                session._connector = aiohttp.TCPConnector(limit=0)
                await stream.aclose()
            return time.monotonic() - left

    assert asyncio.run(vanish()) < 1


def test_replicas_follow_the_load(deploy: Callable[..., str], model: Path) -> None:
    scaling = {"min_replicas": 0, "max_replicas": 2, "target_ongoing_requests": 3, **QUICK_SCALING}
    url = deploy(described(model, autoscaling_config=scaling))
    assert replicas("small") == 0
    answers: list[Answer] = []
    wanted = 0

    async def worker(session: aiohttp.ClientSession, number: int) -> None:
        while number < wanted:
            body = {"prompt": f"n = {number}", "max_tokens": 200, "seed": number, "ignore_eos": True}
            answers.append(await complete(session, url, model="small", **body))

    async def rise_and_fall() -> None:
        nonlocal wanted
        async with client() as session:
            answers.append(await complete(session, url, model="small", prompt="a", max_tokens=4))  # from zero
            wanted = 8
            workers = [asyncio.create_task(worker(session, number)) for number in range(wanted)]
            await until(lambda: replicas("small") == 2, seconds=60)
            wanted = 1
            await until(lambda: replicas("small") == 1, seconds=60)
            await asyncio.sleep(1)
            wanted = 0
            await asyncio.gather(*workers)
            await until(lambda: replicas("small") == 0 and not replica_processes("small"), seconds=60)
            answers.append(await complete(session, url, model="small", prompt="a", max_tokens=4))

    asyncio.run(rise_and_fall())
    assert len(answers) > 10
    assert all(answer.whole for answer in answers), [answer for answer in answers if not answer.whole][:3]


def test_who_comes_too_much_is_told_when_to_come_again(deploy: Callable[..., str], model: Path) -> None:
    few = {"max_ongoing_requests": 1, "max_queued_requests": 1, "retry_after_s": 7}
    url = deploy(described(model, engine={"max_num_seqs": 1}, **few))

    async def too_many() -> tuple[Answer, list[Answer]]:
        body = {"model": "small", "prompt": "a", "max_tokens": LONG, "ignore_eos": True}
        first = Answer()
        async with client() as session:
            stream = events(session, url, first, **body)
            await anext(stream)  # it has the one slot: of those that come now, one may wait
            later = [asyncio.create_task(complete(session, url, **body)) for _ in range(7)]
            async for _ in stream:
                pass
            return first, await asyncio.gather(*later)

    first, later = asyncio.run(too_many())
    refused = [answer for answer in later if not answer.whole]
    assert first.whole
    assert len(refused) < len(later)
    assert refused
    for answer in refused:
        assert (answer.status, answer.headers["Retry-After"]) == (429, "7")
        assert answer.error
        assert answer.error["message"] == "too many requests; try again in 7 s"


def test_several_models_in_one_app_one_of_them_sparse(
    deploy: Callable[..., str], model: Path, corpus: FilesCorpus
) -> None:
    other = random_model(model.parent / "other", Path(corpus.path) / "tokenizer", seed=1)
    add_plan(other, 0.75)
    url = deploy(described(model), described(other, name="org/other", engine={"sparsity": 0.75}))
    body = {"prompt": "import ", "temperature": 1, "seed": 0, "max_tokens": 60}

    async def ask() -> list[str]:
        async with client() as session:
            async with session.get(f"{url}/v1/models") as response:
                listed = [(entry["id"], entry["sparsity"]) for entry in (await response.json())["data"]]
                assert listed == [("small", None), ("org/other", 0.75)]
                assert "access-control-allow-origin" not in response.headers
            return [(await complete(session, url, model=name, **body)).text for name in ("small", "org/other")]

    first, second = asyncio.run(ask())
    assert first != second
    assert [first, second] == [alone(model, [body])[0], alone(other, [body], sparsity=0.75)[0]]
    assert second != alone(other, [body])[0]


def test_the_command_does_not_listen_where_it_cannot(url: str, model: Path, tmp_path: Path) -> None:
    with driver(tmp_path, "serve", str(model), "--port", str(free_port())) as server:
        assert server.wait() == 2
        assert "Ray Serve runs on this cluster already, and listens elsewhere" in server.said()
    assert APP not in serve.status().applications
    with driver(
        tmp_path, "serve", str(model), "--port", url.rpartition(":")[2], "engine_kwargs.max_num_seq=1"
    ) as server:
        assert server.wait() == 2
        assert "Did you mean llm_configs[0].engine_kwargs.max_num_seqs?" in server.said()
