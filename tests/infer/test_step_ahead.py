"""A step that begins before the texts of the one before are made, and graphs whose recording is played by hand."""

import pytest
import torch

from raygrow.infer import graphs
from raygrow.infer.output import Output
from raygrow.infer.request import Delta, Request, merged
from raygrow.infer.runner import Runner
from raygrow.infer.staging import OnItsWay, Staging, to_device
from tests.infer.subjects import Subject, finish, prompts, request, text_of, tokens_of

SCARCE = {"kv_layout": "interleaved", "kv_cache_memory_bytes": 9 * 2 * 4096, "max_num_batched_tokens": 33}


def of_all_kinds(subject: Subject) -> list[Request]:
    kinds = [
        {"max_tokens": 30},
        {"max_tokens": 40, "temperature": 1.0, "seed": 5, "top_p": 0.9, "logprobs": 2},
        {"max_tokens": 1},
        {"max_tokens": 0, "prompt_logprobs": 1},
        {"max_tokens": 25, "prompt_logprobs": 0, "logprobs": 0},
        {"max_tokens": 40, "temperature": 0.7, "seed": 6, "top_k": 9, "ignore_eos": True},
        {"max_tokens": 40, "stop": ("e", "a", "t")},
        {"max_tokens": 40, "temperature": 1.0, "seed": 7, "stop": ("in", "re", " f", "\n")},
    ]
    given = prompts(24, vocab_size=subject.vocab_size, shortest=2, longest=50)
    return [request(str(i), prompt, **kinds[i % len(kinds)]) for i, prompt in enumerate(given)]


@pytest.mark.parametrize("scarce", [False, True])
def test_a_step_ahead_changes_no_answer(subject: Subject, scarce: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("raygrow.infer.memory.PAGE_BYTES", 4096)
    answers = []
    for ahead in (False, True):
        engine = subject.engine(**SCARCE if scarce else {}, async_scheduling=ahead)
        for given in of_all_kinds(subject):
            engine.add(given)
        found = {id: merged(deltas) for id, deltas in finish(engine).items()}
        # what was in the cache depends on when a sequence came in
        answers.append({id: delta._replace(cached_tokens=0) for id, delta in found.items()})
        assert engine.stats.running == engine.stats.waiting == 0
        assert bool(engine.stats.preemptions) == scarce
    for id, expected in answers[0].items():
        assert scored(answers[1][id]) == pytest.approx(scored(expected), abs=1e-4)
        without = [delta._replace(logprobs=(), prompt_logprobs=()) for delta in (answers[1][id], expected)]
        assert without[0] == without[1]
    stopped = [id for id, delta in answers[0].items() if delta.finish_reason == "stop"]
    assert len({int(id) % 8 for id in stopped} & {6, 7}) == 2, "stop texts are found, which end a step too many"


def scored(delta: Delta) -> list[float]:
    return [entry.logprob for entry in (*delta.prompt_logprobs, *delta.logprobs) if entry]


def test_the_next_step_begins_before_texts_are_made(subject: Subject, monkeypatch: pytest.MonkeyPatch):
    seen, run, push = [], Runner.run, Output.push
    monkeypatch.setattr(Runner, "run", lambda *given: seen.append("run") or run(*given))
    monkeypatch.setattr(Output, "push", lambda *given: seen.append("text") or push(*given))
    for ahead in (False, True):
        seen.clear()
        engine = subject.engine(async_scheduling=ahead)
        engine.add(request("a", [5, 6], max_tokens=3, ignore_eos=True))
        finish(engine)
        assert seen == (["run", "run", "text", "run", "text", "text"] if ahead else ["run", "text"] * 3)


def test_what_ends_while_its_next_token_is_computed_gives_nothing_more(subject: Subject):
    engine = subject.engine(async_scheduling=True, max_num_seqs=2)
    whole = finish_one(engine, request("whole", [5, 17, 200], max_tokens=30, ignore_eos=True))
    stop = text_of(whole)[6:8]
    stopped = request("a", [5, 17, 200], max_tokens=30, ignore_eos=True, stop=(stop,))
    engine.add(stopped)
    engine.add(request("other", [9, 8], max_tokens=50, ignore_eos=True))
    found: list[Delta] = []
    while not (found and found[-1].finish_reason):
        found += [delta for delta in engine.step() if delta.id == "a"]
    assert text_of(found) == text_of(whole)[: text_of(whole).index(stop)]
    engine.add(request("a", [5, 17, 200], max_tokens=9, ignore_eos=True))  # the id is free at once
    engine.abort("other")
    engine.add(request("other", [5, 17, 200], max_tokens=9, ignore_eos=True))
    again = finish(engine)
    for id in ("a", "other"):
        assert tokens_of(again[id]) == tokens_of(whole)[:9]
    assert engine.step() == []  # nothing is left over


def finish_one(engine, given: Request) -> list[Delta]:
    engine.add(given)
    return finish(engine)[given.id]


@pytest.mark.parametrize("ahead", [False, True])
def test_graphs_give_the_same_tokens(subject: Subject, ahead: bool, monkeypatch: pytest.MonkeyPatch):
    """As on CUDA, but a recording is computed again by hand: of fixed inputs, into outputs that the next one reuses."""
    replayed = []

    def record(compute, pool):
        outputs = compute()

        def replay() -> None:
            replayed.append(len(outputs[0]))
            for output, computed in zip(outputs, compute(), strict=True):
                output.copy_(computed)

        return replay, outputs, pool

    monkeypatch.setattr(graphs, "record", torch.inference_mode()(record))
    monkeypatch.setattr("raygrow.infer.engine.can_record", lambda model: True)
    engine = subject.engine(max_num_seqs=6, async_scheduling=ahead)
    given = prompts(14, vocab_size=subject.vocab_size)
    for i, prompt in enumerate(given):
        engine.add(request(str(i), prompt, max_tokens=5 + i))
    engine.add(request("drawn", given[0], temperature=1.0, seed=3, max_tokens=20, logprobs=1))
    found = finish(engine)
    assert [tokens_of(found[str(i)]) for i in range(14)] == [
        subject.greedy(prompt, 5 + i) for i, prompt in enumerate(given)
    ]
    alone = finish_one(subject.engine(), request("drawn", given[0], temperature=1.0, seed=3, max_tokens=20))
    assert tokens_of(found["drawn"]) == tokens_of(alone)
    assert {1, 6} <= set(replayed) <= {1, 2, 4, 6}


def test_numbers_arrive_and_memory_is_filled_again():
    staging = Staging(5, torch.device("cpu"))
    out = torch.full((3, 4), 77)
    assert staging.send([[1, 2], [3, 4], [5, 6]]).tolist() == [[1, 2], [3, 4], [5, 6]]
    filled = staging.send([[1], [2], [3]], (0, 0, 9), out=out)
    assert filled.tolist() == [[1, 0, 0, 0], [2, 0, 0, 0], [3, 9, 9, 9]]
    assert filled.data_ptr() == out.data_ptr()
    assert OnItsWay(to_device([3, 1], torch.device("cpu"))).tolist() == [3, 1]


@pytest.mark.gpu
def test_memory_that_is_filled_again_is_not_filled_too_early():
    device = torch.device("cuda")
    staging = Staging(1000, device)
    sent = []
    for number in range(200):
        torch.cuda._sleep(200_000)  # the device is late
        sent.append(staging.send([[number] * 1000] * 3))
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(sent))
    late = [OnItsWay(tensor[0, :3]) for tensor in sent]
    assert [numbers.tolist() for numbers in late] == [[number] * 3 for number in range(200)]
