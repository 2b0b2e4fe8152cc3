"""An engine in another process: the same answers, and an end of the one is told in the other."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest

from raygrow.infer import process
from raygrow.infer.config import EngineConfig
from raygrow.infer.engine import Engine
from raygrow.infer.load import load_engine
from raygrow.infer.process import EngineProcess
from raygrow.infer.request import Delta, PromptTooLong, Request, merged
from raygrow.nn.config import ModelConfig
from raygrow.nn.init import init_weights
from raygrow.nn.rack import Rack
from raygrow.text.tokenizer import train_tokenizer
from raygrow.weights.folder import write_folder
from tests.infer.subjects import prompts, request, text_of, tokens_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    train_tokenizer([Path(__file__).read_text()], 400).save(path / "tokenizer")
    config = ModelConfig(vocab_size=512, d_model=32, n_heads=4, d_ff=64, blocks_per_stack=2, max_seq_len=1024)
    model = Rack(config)
    init_weights(model, config, seed=0)
    return write_folder(path / "model", config, model.state_dict().items(), tokenizer_from=path / "tokenizer")


@contextmanager
def started(folder: Path, **config) -> Iterator[EngineProcess]:
    engine = EngineProcess(partial(load_engine, folder, EngineConfig(**config)))
    try:
        yield engine
    finally:
        asyncio.run(engine.close())


async def collect(engine: EngineProcess, request: Request) -> list[Delta]:
    return [delta async for delta in engine.generate(request)]


def tokens_and_scores(answer: Delta) -> tuple[list[int], list[float]]:
    """All tokens that have log-probabilities, and these."""
    entries = [entry for entry in (*answer.prompt_logprobs, *answer.logprobs) if entry]
    pairs = [pair for entry in entries for pair in ((entry.token_id, entry.logprob), *entry.top)]
    return [token for token, _ in pairs], [score for _, score in pairs]


async def idle(engine: EngineProcess, *, seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while (await engine.stats()).running:
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


def test_answers_are_those_of_an_engine_here(folder: Path):
    given = [
        request(str(i), prompt, max_tokens=8, logprobs=i % 3, prompt_logprobs=0 if i % 2 else None)
        for i, prompt in enumerate(prompts(12, vocab_size=256))
    ]
    here = load_engine(folder, EngineConfig(max_num_seqs=4))
    for each in given:
        here.add(each)
    expected: dict[str, list[Delta]] = {each.id: [] for each in given}
    while here.has_work:
        for delta in here.step():
            expected[delta.id].append(delta)

    async def main(engine: EngineProcess) -> list[list[Delta]]:
        return await asyncio.gather(*(collect(engine, each) for each in given))

    with started(folder, max_num_seqs=4) as engine:
        found = asyncio.run(main(engine))
    for each, deltas in zip(given, found, strict=True):
        wanted = expected[each.id]
        assert tokens_of(deltas) == tokens_of(wanted)
        assert text_of(deltas) == text_of(wanted)
        assert all(delta.id == each.id for delta in deltas)
        (named, scores), (names, true) = (tokens_and_scores(merged(pieces)) for pieces in (deltas, wanted))
        assert named == names
        assert scores == pytest.approx(true, abs=1e-5)  # who comes when decides the company, and it the rounding


def test_what_cannot_be_taken_is_told_and_who_leaves_frees_his_slot(folder: Path):
    async def main(engine: EngineProcess) -> None:
        with pytest.raises(PromptTooLong, match="the prompt has 2000 tokens"):
            await collect(engine, request("long", [1] * 2000))
        async with aclosing(engine.generate(request("gone", [1, 2], max_tokens=900, ignore_eos=True))) as stream:
            await anext(stream)
            with pytest.raises(ValueError, match="already in use"):
                await collect(engine, request("gone", [1]))
            assert (await engine.stats()).running == 1
        await idle(engine)
        assert len(tokens_of(await collect(engine, request("next", [1], max_tokens=3, ignore_eos=True)))) == 3

    with started(folder) as engine:
        asyncio.run(main(engine))


def test_what_does_not_load_is_told(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        EngineProcess(partial(load_engine, tmp_path / "nothing"))
    with pytest.raises(RuntimeError, match=r"did not start: its process has ended \(exit status 3\)"):
        EngineProcess(partial(os._exit, 3))


@pytest.mark.parametrize("killed", [True, False])
def test_the_end_of_its_process_ends_all_requests(folder: Path, killed: bool):
    async def main(engine: EngineProcess) -> None:
        streams = [engine.generate(request(str(i), [1, 2], max_tokens=900, ignore_eos=True)) for i in range(3)]
        for stream in streams:
            await anext(stream)
        if killed:
            engine._process.send_signal(signal.SIGKILL)
        else:
            await engine.close()
        for stream in streams:
            last = [delta async for delta in stream][-1]
            assert last.finish_reason == ("error" if killed else "abort")
            assert last.error == ("the engine has failed: its process has ended (exit status -9)" if killed else None)
        told = "the engine has failed" if killed else "the engine is closed"
        with pytest.raises(RuntimeError, match=told):
            await collect(engine, request("late", [1]))
        with pytest.raises(RuntimeError, match=told):
            await engine.stats()

    with started(folder) as engine:
        asyncio.run(main(engine))


def impatient(folder: Path) -> Engine:
    process.HANGING_SECONDS = 2.0
    return load_engine(folder)


@pytest.mark.slow
@pytest.mark.parametrize("busy", [False, True])
def test_nobody_has_to_ask_it_how_it_is(folder: Path, busy: bool):
    async def main(engine: EngineProcess) -> None:
        await engine.stats()
        for i in range(10):
            if busy:
                assert (await collect(engine, request(str(i), (1, 2), max_tokens=1)))[-1].finish_reason
            await asyncio.sleep(0.25)
        await engine.stats()
        await engine.close()

    asyncio.run(main(EngineProcess(partial(impatient, folder))))


@pytest.mark.skipif(sys.platform != "linux", reason="a process that is stopped sees no end of a pipe")
def test_it_ends_with_the_process_that_started_it(folder: Path):
    script = """
        import os, signal, sys
        from functools import partial
        from raygrow.infer.load import load_engine
        from raygrow.infer.process import EngineProcess
        pid = EngineProcess(partial(load_engine, sys.argv[1]))._process.pid
        print(pid, flush=True)
        os.kill(pid, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), folder], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid, end = int(done.stdout), time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.05)
