import asyncio
import sys
import threading
import time
from contextlib import aclosing

import pytest

from raygrow.infer.engine import Engine
from raygrow.infer.loop import SWITCH_SECONDS, EngineLoop
from raygrow.infer.request import Delta, Request
from tests.infer.subjects import Subject, prompts, request, text_of, tokens_of


@pytest.fixture
def quick(subject_of) -> Subject:
    return subject_of("llama gqa tied")


async def collect(loop: EngineLoop, request: Request) -> list[Delta]:
    return [delta async for delta in loop.generate(request)]


async def until(holds, *, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


def test_many_streams_get_their_own_tokens(quick: Subject):
    given = prompts(40, vocab_size=quick.vocab_size)

    async def main() -> list[list[Delta]]:
        loop = EngineLoop(quick.engine())
        streams = [collect(loop, request(str(i), prompt, max_tokens=8)) for i, prompt in enumerate(given)]
        found = await asyncio.gather(*streams)
        loop.check()
        await loop.close()
        return found

    found = asyncio.run(main())
    assert [tokens_of(deltas) for deltas in found] == [quick.greedy(prompt, 8) for prompt in given]
    assert all({delta.id for delta in deltas} == {str(i)} for i, deltas in enumerate(found))


def test_a_slow_reader_gets_fewer_and_larger_pieces(quick: Subject):
    async def main() -> list[Delta]:
        loop, found = EngineLoop(quick.engine()), []
        async with aclosing(loop.generate(request("slow", [1, 2], max_tokens=60, ignore_eos=True))) as stream:
            async for delta in stream:
                found.append(delta)
                await until(lambda: loop.stats.running == 0)
        await loop.close()
        return found

    found = asyncio.run(main())
    assert len(found) == 2
    assert len(tokens_of(found)) == 60
    assert found[-1].finish_reason == "length"


def test_a_stream_that_is_closed_frees_its_slot(quick: Subject):
    async def main() -> None:
        loop = EngineLoop(quick.engine())
        async with aclosing(loop.generate(request("gone", [1, 2], max_tokens=90, ignore_eos=True))) as stream:
            async for _ in stream:
                break
        await until(lambda: loop.stats.running == 0, seconds=1)
        task = asyncio.create_task(collect(loop, request("cancelled", [1, 2], max_tokens=90, ignore_eos=True)))
        await until(lambda: loop.stats.running == 1 or task.done())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: loop.stats.running == 0, seconds=1)
        assert len(tokens_of(await collect(loop, request("next", [1, 2], max_tokens=3, ignore_eos=True)))) == 3
        await loop.close()

    asyncio.run(main())


def test_requests_come_from_several_event_loops(quick: Subject):
    loop, found = EngineLoop(quick.engine()), {}

    def caller(id: str) -> None:
        found[id] = asyncio.run(collect(loop, request(id, [1, 2, 3], max_tokens=20)))

    threads = [threading.Thread(target=caller, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asyncio.run(loop.close())
    assert len({text_of(deltas) for deltas in found.values()}) == 1
    assert all(tokens_of(deltas) == quick.greedy([1, 2, 3], 20) for deltas in found.values())


def test_requests_that_cannot_be_taken_say_so(quick: Subject):
    async def main() -> None:
        loop = EngineLoop(quick.engine())
        with pytest.raises(ValueError, match="the prompt has 0 tokens"):
            await collect(loop, request("empty", []))
        async with aclosing(loop.generate(request("same", [1], max_tokens=90, ignore_eos=True))) as first:
            await anext(first)
            with pytest.raises(ValueError, match="already in use"):
                await collect(loop, request("same", [1]))
            await anext(first)  # goes on
        await loop.close()

    asyncio.run(main())


def test_a_request_that_breaks_what_takes_it_in_is_told_and_the_others_go_on(
    quick: Subject, monkeypatch: pytest.MonkeyPatch
):
    async def main() -> None:
        engine = quick.engine()
        add = engine.add

        def fail(request: Request) -> None:
            if request.id == "bad":
                raise OverflowError("no tokenizer can read this")
            add(request)

        monkeypatch.setattr(engine, "add", fail)
        loop = EngineLoop(engine)
        requests = [request(id, [1], max_tokens=5, ignore_eos=True) for id in ("bad", "good")]
        async with asyncio.timeout(10):
            bad, good = await asyncio.gather(*(collect(loop, each) for each in requests), return_exceptions=True)
        assert isinstance(bad, OverflowError)
        assert isinstance(good, list)
        assert len(tokens_of(good)) == 5
        loop.check()
        await loop.close()

    asyncio.run(main())


def test_who_is_gone_takes_no_one_along_that_has_the_same_id(quick: Subject):
    async def main() -> None:
        loop = EngineLoop(quick.engine())
        async with aclosing(loop.generate(request("same", [1], max_tokens=90, ignore_eos=True))) as first:
            tokens = [*(await anext(first)).token_ids]
            second = asyncio.create_task(collect(loop, request("same", [1])))
            await asyncio.sleep(0)  # it has asked, and nobody has answered yet
            second.cancel()
            async with asyncio.timeout(10):
                tokens += tokens_of([delta async for delta in first])
        assert len(tokens) == 90
        await loop.close()

    asyncio.run(main())


def test_when_a_step_fails_every_stream_ends_with_an_error(quick: Subject, monkeypatch: pytest.MonkeyPatch):
    async def main() -> None:
        engine = quick.engine()
        loop = EngineLoop(engine)
        streams = [collect(loop, request(str(i), [1, 2], max_tokens=90, ignore_eos=True)) for i in range(6)]
        tasks = [asyncio.create_task(stream) for stream in streams]
        await until(lambda: engine.stats.waiting == 2)

        def fail() -> list[Delta]:
            raise OSError("the device is gone")

        monkeypatch.setattr(engine, "step", fail)
        for deltas in await asyncio.gather(*tasks):
            assert deltas[-1].finish_reason == "error"
            assert deltas[-1].error == "the engine has failed: the device is gone"
        with pytest.raises(RuntimeError, match="the engine has failed: the device is gone"):
            loop.check()
        with pytest.raises(RuntimeError, match="the engine has failed: the device is gone"):
            await collect(loop, request("late", [1]))
        await loop.close()

    asyncio.run(main())


def test_a_step_that_does_not_end_is_noticed(quick: Subject, monkeypatch: pytest.MonkeyPatch):
    async def main() -> None:
        engine = quick.engine()
        loop, hold = EngineLoop(engine, stuck_seconds=0.1), threading.Event()
        step = Engine.step
        monkeypatch.setattr(engine, "step", lambda: (hold.wait(10), step(engine))[1])
        task = asyncio.create_task(collect(loop, request("a", [1], max_tokens=1)))
        await asyncio.sleep(0.3)
        with pytest.raises(RuntimeError, match="the engine is stuck"):
            loop.check()
        hold.set()
        assert (await task)[-1].finish_reason
        loop.check()
        await loop.close()

    asyncio.run(main())


def test_closing_ends_what_is_unfinished(quick: Subject):
    async def main() -> None:
        loop = EngineLoop(quick.engine(max_num_seqs=1))
        tasks = [
            asyncio.create_task(collect(loop, request(str(i), [1], max_tokens=90, ignore_eos=True))) for i in range(2)
        ]
        await until(lambda: loop.stats.waiting == 1)
        await loop.close()
        assert [deltas[-1].finish_reason for deltas in await asyncio.gather(*tasks)] == ["abort", "abort"]
        with pytest.raises(RuntimeError, match="closed"):
            await collect(loop, request("late", [1]))
        with pytest.raises(RuntimeError, match="closed"):
            loop.check()

    asyncio.run(main())


def test_the_engine_does_not_wait_long_for_its_turn(quick: Subject):
    async def main() -> None:
        sys.setswitchinterval(0.005)
        loop = EngineLoop(quick.engine())
        assert sys.getswitchinterval() == pytest.approx(SWITCH_SECONDS)
        await loop.close()

    asyncio.run(main())
