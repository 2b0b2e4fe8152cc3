"""A served model under load: tokens per second, and how long clients wait for the first token and for each next one.

    python benchmarks/serve_load.py                         the engine, and the same through Ray Serve and HTTP; one GPU
    python benchmarks/serve_load.py --rate 8                8 requests a second, instead of all at once
    python benchmarks/serve_load.py --url http://localhost:8000    any server of this kind, OpenAI-compatible
    python benchmarks/serve_load.py --smoke                 tiny, also on a CPU: does it all work?

The work is that of engine_throughput.py, three times over: a random model of 1.37B parameters in bf16, 768 requests for
256 slots, prompts (as token ids) and answers of 100 to 1024 tokens each, greedy. Three ways get the same requests:
`Engine.step` called in a loop (`engine`, all at once only), the engine in its thread with asyncio around it (`loop`),
and Ray Serve: an ingress and a replica, whose engine has a process of its own, asked over HTTP on localhost by
streaming clients in processes of their own (`serve`). Each way has its own process, one after the other, so that none
finds what another has cached or shares its memory, and fills all its slots once before it counts. That all requests
come at one moment is the hardest for a server: `--requests 256` shows that moment by itself.

TTFT: from sending a request to its first chunk. TPOT: from there to the last chunk, by the tokens after the first.
Tokens are those of the server's own count (`stream_options.include_usage`). The rate is all new tokens by the time from
the first request sent to the last chunk received.
"""

import argparse
import asyncio
import json
import multiprocessing
import random
import socket
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import httpx2
import torch
from common import write_results
from workload import (
    LARGE,
    LENGTHS,
    SMOKE,
    SMOKE_LENGTHS,
    Work,
    draw_work,
    engine_config,
    make_folder,
    requests,
    run_engine,
)

MODEL = "random"
WARM_UP_TOKENS = 8
"""Of answers before those that count, as many as there are slots."""
LEAD_SECONDS = 0.5
"""Between the start of the clients and the first request, so that all of them are there."""
TIMEOUT_SECONDS = 600.0
CLIENTS = 4


@dataclass
class Record:
    """What a client saw of one request, in seconds of the system's clock."""

    sent: float
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    chunks: int = 0
    error: str = ""


@dataclass(frozen=True)
class Job:
    """A request and when it is to be sent, in seconds from the start."""

    work: Work
    arrival: float


@dataclass(frozen=True)
class Load:
    """How requests come."""

    jobs: list[Job]
    concurrency: int | None = None
    """Requests that are open at once, at most."""
    warm_up: list[Work] = field(default_factory=list)


Ask = Callable[[Work, Record], Awaitable[None]]
"""Sends a request and fills in its record."""


def main() -> None:
    """Measures, prints, writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=768)
    parser.add_argument("--slots", type=int, default=256, help="requests that the engine runs at once")
    parser.add_argument("--rate", type=float, help="requests a second, at random moments; all at once when not given")
    parser.add_argument("--concurrency", type=int, help="requests that are open at once, at most")
    parser.add_argument("--clients", type=int, default=CLIENTS, help="processes that ask over HTTP")
    parser.add_argument("--turns", type=int, default=1, help="of each way, each with other prompts")
    parser.add_argument("--url", help="a running server, without /v1, instead of the three ways")
    parser.add_argument("--model", help="what it calls the model; its first one when not given")
    parser.add_argument("--vocab", type=int, default=1000, help="token ids of its prompts are below this")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.requests, arguments.slots, arguments.clients = 6, 4, 2
    loads = [make_load(arguments, seed) for seed in range(arguments.turns)]
    if arguments.url:
        model = arguments.model or first_model(arguments.url)
        rows = [over_http(load, arguments.url, model, arguments.clients) for load in loads]
        result: dict[str, Any] = {"url": rows}
    else:
        result = three_ways(arguments, loads)
    for way, rows in result.items():
        for row in rows:
            show(way, row)
    rates = {way: statistics.median(row["tokens_per_second"] for row in rows) for way, rows in result.items()}
    ratios = {f"serve / {way}": rates["serve"] / rates[way] for way in ("engine", "loop") if way in rates}
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f}")
    if not arguments.smoke and not arguments.url:
        write_results("serve_load", {"settings": vars(arguments), "ways": result, "ratios": ratios})


def make_load(arguments: argparse.Namespace, seed: int) -> Load:
    """The requests of one turn, and when they come."""
    vocab = arguments.vocab if arguments.url else (SMOKE if arguments.smoke else LARGE).vocab_size
    lengths = SMOKE_LENGTHS if arguments.smoke else LENGTHS
    draw, moment, jobs = random.Random(seed), 0.0, []
    for work in draw_work(arguments.requests, seed=seed, lengths=lengths, vocab_size=vocab):
        jobs.append(Job(work, moment))
        if arguments.rate:
            moment += draw.expovariate(arguments.rate)
    warm_up = draw_work(min(arguments.slots, arguments.requests), seed=1000 + seed, lengths=lengths, vocab_size=vocab)
    return Load(jobs, arguments.concurrency, [work._replace(new=WARM_UP_TOKENS) for work in warm_up])


def three_ways(arguments: argparse.Namespace, loads: list[Load]) -> dict[str, list[dict[str, Any]]]:
    """The engine by itself, in its loop, and served."""
    ways: dict[str, Callable[..., list[dict[str, Any]]]] = {"engine": with_engine, "loop": with_loop}
    if arguments.rate or arguments.concurrency:
        del ways["engine"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    longest = max(len(job.work.prompt) + job.work.new for load in loads for job in load.jobs)
    config = engine_config(device, seqs=arguments.slots, max_len=longest)
    with tempfile.TemporaryDirectory() as temporary:
        folder = alone(make_folder, SMOKE if arguments.smoke else LARGE, Path(temporary), device)
        result = {}
        for name, way in ways.items():
            result[name] = alone(way, folder, config, loads)
            print(f"{name}: done", flush=True)
        result["serve"] = with_serve(folder, config, loads, arguments.clients, arguments.smoke)
    return result


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a process of its own, which takes the GPU's memory with it when it ends."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def with_engine(folder: Path, config: Any, loads: list[Load]) -> list[dict[str, Any]]:
    """`Engine.step`, again and again: nobody waits for single tokens."""
    from raygrow.infer.load import load_engine

    engine = load_engine(folder, config)
    rows = []
    for load in loads:
        run_engine(engine, load.warm_up)
        seconds = sum(run_engine(engine, [job.work for job in load.jobs]))
        rows.append({"tokens_per_second": sum(job.work.new for job in load.jobs) / seconds, "seconds": seconds})
    return rows


def with_loop(folder: Path, config: Any, loads: list[Load]) -> list[dict[str, Any]]:
    """The engine in its thread, asked by coroutines."""
    from raygrow.infer.load import load_engine
    from raygrow.infer.loop import EngineLoop

    loop = EngineLoop(load_engine(folder, config))

    async def ask(work: Work, record: Record) -> None:
        request = next(requests([work], f"{id(record)}-"))
        async with aclosing(cast(Any, loop.generate(request))) as deltas:
            async for delta in deltas:
                seen(record, len(delta.token_ids))

    async def all_loads() -> list[dict[str, Any]]:
        rows = []
        for load in loads:
            await drive([Job(work, 0.0) for work in load.warm_up], None, ask, time.perf_counter())
            rows.append(summary(await drive(load.jobs, load.concurrency, ask, time.perf_counter())))
        await loop.close()
        return rows

    return asyncio.run(all_loads())


def with_serve(folder: Path, config: Any, loads: list[Load], clients: int, smoke: bool) -> list[dict[str, Any]]:
    """Ray Serve on localhost."""
    import ray
    from ray import serve

    from raygrow.runtime.cluster import connect
    from raygrow.runtime.serve import APP, application
    from raygrow.runtime.serve_config import (
        DeploymentConfig,
        IngressConfig,
        LLMConfig,
        ModelLoadingConfig,
        ServeConfig,
    )

    share = 0.5 if smoke else 1.0
    model = LLMConfig(
        model_loading_config=ModelLoadingConfig(model_id=MODEL, model_source=str(folder)),
        engine_kwargs=config,
        deployment_config=DeploymentConfig(ray_actor_options={"num_cpus": share} if config.device == "cpu" else None),
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    connect()
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        app = application(ServeConfig(llm_configs=(model,), ingress=IngressConfig(num_cpus=share)))
        serve.run(app, name=APP, route_prefix="/")
        return [over_http(load, f"http://127.0.0.1:{port}", MODEL, clients) for load in loads]
    finally:
        serve.shutdown()
        ray.shutdown()


def first_model(url: str) -> str:
    """What a server calls its first model."""
    return httpx2.get(f"{url}/v1/models").raise_for_status().json()["data"][0]["id"]


def over_http(load: Load, url: str, model: str, clients: int) -> dict[str, Any]:
    """One turn of a server: requests are dealt out to processes, which begin together."""
    clients = min(clients, load.concurrency or clients)
    shares = [load.concurrency and len(range(i, load.concurrency, clients)) for i in range(clients)]
    with ExitStack() as stack:
        spawn = multiprocessing.get_context("spawn")
        pools = [stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn)) for _ in range(clients)]

        def ask_all(jobs: list[Job], start: float) -> list[Record]:
            begun = [
                pool.submit(ask_for, url, model, share, start, jobs[i::clients])
                for i, (pool, share) in enumerate(zip(pools, shares, strict=True))
            ]
            return [record for future in begun for record in future.result()]

        ask_all([Job(work, 0.0) for work in load.warm_up], 0.0)  # until all processes are there
        return summary(ask_all(load.jobs, time.perf_counter() + LEAD_SECONDS))


def ask_for(url: str, model: str, concurrency: int | None, start: float, jobs: list[Job]) -> list[Record]:
    """One process of clients."""

    async def all_jobs() -> list[Record]:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx2.AsyncClient(limits=limits, timeout=TIMEOUT_SECONDS) as client:
            return await drive(jobs, concurrency, partial(ask_server, client, url, model), start)

    return asyncio.run(all_jobs())


async def ask_server(client: httpx2.AsyncClient, url: str, model: str, work: Work, record: Record) -> None:
    """A completion, streamed."""
    body = {
        "model": model,
        "prompt": list(work.prompt),
        "max_tokens": work.new,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"status {response.status_code}: {(await response.aread())[:300]!r}")
        async for line in response.aiter_lines():
            data = line.removeprefix("data:").strip()
            if not data or data == "[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise RuntimeError(str(event["error"]))
            if event["choices"]:
                seen(record, 0)
            if event.get("usage"):
                record.tokens = event["usage"]["completion_tokens"]


def seen(record: Record, tokens: int) -> None:
    """Notes that something has come."""
    record.last = time.perf_counter()
    record.first = record.first or record.last
    record.tokens += tokens
    record.chunks += 1


async def drive(jobs: list[Job], concurrency: int | None, ask: Ask, start: float) -> list[Record]:
    """Sends every request at its time. What goes wrong is noted, and the others go on."""
    places = asyncio.Semaphore(concurrency or max(1, len(jobs)))

    async def send(job: Job) -> Record:
        await asyncio.sleep(max(0.0, start + job.arrival - time.perf_counter()))
        async with places:
            record = Record(sent=time.perf_counter())
            try:
                await ask(job.work, record)
                if record.tokens != job.work.new:
                    record.error = f"{record.tokens} tokens instead of {job.work.new}"
            except Exception as error:
                record.error = f"{type(error).__name__}: {error}"
            return record

    return await asyncio.gather(*(send(job) for job in jobs))


def summary(records: list[Record]) -> dict[str, Any]:
    """The figures of a turn."""
    whole = [record for record in records if not record.error]
    if not whole:
        raise RuntimeError(f"no request was answered: {records[0].error}")
    seconds = max(record.last for record in whole) - min(record.sent for record in records)
    tokens = sum(record.tokens for record in whole)
    return {
        "tokens_per_second": tokens / seconds,
        "requests_per_second": len(whole) / seconds,
        "seconds": seconds,
        "tokens": tokens,
        "chunks": sum(record.chunks for record in whole),
        "failed": len(records) - len(whole),
        "errors": sorted({record.error for record in records if record.error})[:5],
        "ttft_ms": percentiles([1e3 * (record.first - record.sent) for record in whole]),
        "tpot_ms": percentiles(
            [1e3 * (record.last - record.first) / (record.tokens - 1) for record in whole if record.tokens > 1]
        ),
    }


def percentiles(values: list[float]) -> dict[str, float]:
    """Of a list, the nearest of its values."""
    ordered = sorted(values)
    return {f"p{share}": ordered[round(share / 100 * (len(ordered) - 1))] for share in (50, 90, 99)}


def show(way: str, row: dict[str, Any]) -> None:
    """One turn as a line."""
    line = f"{way:8}{row['tokens_per_second']:10,.0f} tokens/s in {row['seconds']:7.2f} s"
    for name in ("ttft_ms", "tpot_ms"):
        if name in row:
            line += f"   {name} " + " ".join(f"{share} {value:.1f}" for share, value in row[name].items())
    if "chunks" in row:
        line += f"   {row['chunks']:,} chunks, {row['failed']} failed"
    print(line, *row.get("errors", ()), sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
