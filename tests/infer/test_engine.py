"""The engine against transformers: the same tokens and log-probabilities, whatever runs beside a request."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from raygrow.infer.config import EngineConfig
from raygrow.infer.engine import Engine
from raygrow.infer.load import load_engine
from raygrow.infer.request import Delta
from raygrow.infer.slots import MIN_COPIED
from raygrow.nn.config import ModelConfig
from raygrow.nn.rack import Rack
from raygrow.text.tokenizer import Tokenizer, load_tokenizer
from raygrow.weights.folder import load_model
from tests.infer import fake_driver
from tests.infer.fake_driver import FakeDriver
from tests.infer.subjects import MAX_TOKENS, Subject, finish, gaps, prompts, request, text_of, tokens_of


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Settings under which four sequences of the usual subject do not fit into memory: its pages hold 10 tokens."""
    monkeypatch.setattr("raygrow.infer.memory.PAGE_BYTES", 4096)
    return {"kv_layout": "interleaved", "kv_cache_memory_bytes": 9 * 2 * 4096}


def run_alone(engine: Engine, **sampling) -> list[Delta]:
    engine.add(request("alone", **sampling))
    return finish(engine)["alone"]


def test_greedy_tokens_one_at_a_time(each_subject: Subject):
    engine = each_subject.engine()
    for prompt in prompts(5, vocab_size=each_subject.vocab_size):
        assert tokens_of(run_alone(engine, prompt=prompt, max_tokens=30)) == each_subject.greedy(prompt, 30)


def test_greedy_tokens_with_arrivals_and_departures(each_subject: Subject):
    engine, chance = each_subject.engine(), random.Random(0)
    waiting = {
        str(i): (prompt, chance.randint(1, 30))
        for i, prompt in enumerate(prompts(14, vocab_size=each_subject.vocab_size))
    }
    expected = {id: each_subject.greedy(prompt, n) for id, (prompt, n) in waiting.items()}
    found: dict[str, list[int]] = {id: [] for id in waiting}
    busiest = 0
    while waiting or engine.has_work:
        for id in list(waiting)[: chance.choice([0, 0, 1, 2])]:
            prompt, n = waiting.pop(id)
            engine.add(request(id, prompt, max_tokens=n))
        for delta in engine.step():
            found[delta.id] += delta.token_ids
        busiest = max(busiest, engine.stats.running)
    assert found == expected
    assert busiest == 4


@pytest.mark.parametrize("budget", [4, 7, 13])
def test_prompts_in_chunks_of_odd_sizes(subject: Subject, budget: int):
    engine = subject.engine(max_num_batched_tokens=budget)
    given = prompts(8, vocab_size=subject.vocab_size, shortest=10)
    for i, prompt in enumerate(given):
        engine.add(request(str(i), prompt, max_tokens=12))
    found = finish(engine)
    assert [tokens_of(found[str(i)]) for i in range(8)] == [subject.greedy(prompt, 12) for prompt in given]


def test_a_prompt_takes_its_beginning_from_a_sequence_that_has_ended(each_subject: Subject):
    engine = each_subject.engine()
    (first, tail) = prompts(2, vocab_size=each_subject.vocab_size, shortest=50, longest=50)
    run_alone(engine, prompt=first, max_tokens=5)
    deltas = run_alone(engine, prompt=[*first, *tail[:20]], max_tokens=15)
    assert deltas[0].cached_tokens == 50
    assert tokens_of(deltas) == each_subject.greedy([*first, *tail[:20]], 15)
    again = run_alone(engine, prompt=[*first, *tail[:20]], max_tokens=15)
    assert again[0].cached_tokens == 69  # all but the last, which gives the logits
    assert tokens_of(again) == tokens_of(deltas)
    assert engine.stats.prefix_hit_tokens == 50 + 69


def test_a_prompt_takes_its_beginning_from_one_that_runs(each_subject: Subject):
    engine = each_subject.engine()
    (first, tail) = prompts(2, vocab_size=each_subject.vocab_size, shortest=50, longest=50)
    others = {str(i): [*first[: 30 + 5 * i], *tail[:10]] for i in range(3)}
    engine.add(request("first", first, max_tokens=30))
    (begun,) = engine.step()
    for id, prompt in others.items():
        engine.add(request(id, prompt, max_tokens=20))
    found = finish(engine)
    found["first"].insert(0, begun)
    assert 30 < MIN_COPIED <= 35
    assert [found[id][0].cached_tokens for id in others] == [0, 35, 40]
    for id, prompt in ({"first": first} | others).items():
        n = 30 if id == "first" else 20
        assert tokens_of(found[id]) == each_subject.greedy(prompt, n)


@pytest.mark.parametrize("budget", [16, 2048])
def test_equal_prompts_that_come_together_are_computed_once(each_subject: Subject, budget: int):
    engine = each_subject.engine(max_num_batched_tokens=budget)
    (prompt,) = prompts(1, vocab_size=each_subject.vocab_size, shortest=80, longest=80)
    for id in "abc":
        engine.add(request(id, prompt, max_tokens=12))
    found = finish(engine)
    assert [found[id][0].cached_tokens for id in "abc"] == [0, 79, 79]
    expected = each_subject.greedy(prompt, 12)
    assert [tokens_of(found[id]) for id in "abc"] == [expected] * 3


def test_a_long_sequence_is_not_given_up_for_a_short_common_beginning(subject: Subject):
    engine = subject.engine()
    (long, tail) = prompts(2, vocab_size=subject.vocab_size, shortest=90, longest=90)
    run_alone(engine, prompt=long, max_tokens=2)
    short = [*long[:40], *tail[:5]]
    deltas = run_alone(engine, prompt=short, max_tokens=10)
    assert deltas[0].cached_tokens == 40
    assert tokens_of(deltas) == subject.greedy(short, 10)
    assert run_alone(engine, prompt=long, max_tokens=2)[0].cached_tokens == 89


def test_prompts_of_new_lengths_have_no_plans_built_for_them(subject: Subject, monkeypatch: pytest.MonkeyPatch):
    cudnn, attention = [], torch.nn.functional.scaled_dot_product_attention

    def seen(*tensors: torch.Tensor, **settings) -> torch.Tensor:
        cudnn.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*tensors, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    run_alone(subject.engine(max_num_batched_tokens=20), prompt=[5] * 30, max_tokens=2)
    assert len(cudnn) == 3 * subject.reference.config.num_hidden_layers
    assert not any(cudnn)
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_without_prefix_caching_nothing_is_reused(subject: Subject):
    engine = subject.engine(enable_prefix_caching=False)
    (prompt,) = prompts(1, vocab_size=subject.vocab_size, shortest=50)
    for _ in range(2):
        assert run_alone(engine, prompt=prompt, max_tokens=5)[0].cached_tokens == 0


def test_sequences_that_had_to_make_room_give_the_same_tokens(subject: Subject, scarce: dict):
    engine = subject.engine(**scarce)
    given = prompts(10, vocab_size=subject.vocab_size, shortest=5, longest=40)
    for i, prompt in enumerate(given):
        engine.add(request(str(i), prompt, max_tokens=50, ignore_eos=True, prompt_logprobs=0, logprobs=0))
    found = finish(engine)
    assert engine.stats.preemptions > 3
    for i, prompt in enumerate(given):
        deltas, (first, *_) = found[str(i)], found[str(i)]
        tokens = tokens_of(deltas)
        logprobs = subject.logprobs([*prompt, *tokens])
        assert tokens == logprobs[len(prompt) - 1 : -1].argmax(-1).tolist()
        assert len(tokens) == 50
        assert [delta.prompt_logprobs for delta in deltas[1:]] == [()] * 49
        scored = [*first.prompt_logprobs[1:], *(logprob for delta in deltas for logprob in delta.logprobs)]
        whole = torch.tensor([*prompt, *tokens])[1:]
        assert [logprob.token_id for logprob in scored if logprob] == whole.tolist()
        expected = logprobs[:-1].gather(1, whole[:, None])[:, 0]
        assert torch.allclose(torch.tensor([logprob.logprob for logprob in scored if logprob]), expected, atol=1e-4)


def test_logprobs_of_new_tokens(each_subject: Subject):
    engine = each_subject.engine()
    given = prompts(3, vocab_size=each_subject.vocab_size, shortest=5)
    for i, prompt in enumerate(given):
        engine.add(request(str(i), prompt, max_tokens=10, temperature=1.5, seed=i, logprobs=5))
    engine.add(request("unasked", given[0], max_tokens=10))
    found = finish(engine)
    assert all(not delta.logprobs for delta in found["unasked"])
    for i, prompt in enumerate(given):
        tokens = tokens_of(found[str(i)])
        given_out = [logprob for delta in found[str(i)] for logprob in delta.logprobs]
        expected_TV = each_subject.logprobs([*prompt, *tokens])[len(prompt) - 1 : -1]
        assert [logprob.token_id for logprob in given_out] == tokens
        for logprob, expected_V in zip(given_out, expected_TV, strict=True):
            assert logprob.logprob == pytest.approx(float(expected_V[logprob.token_id]), abs=1e-4)
            top = expected_V.topk(5)
            assert [token for token, _ in logprob.top] == top.indices.tolist()
            assert [value for _, value in logprob.top] == pytest.approx(top.values.tolist(), abs=1e-4)
            assert dict(logprob.top).get(logprob.token_id, logprob.logprob) == logprob.logprob  # the same float


@pytest.mark.parametrize("budget", [7, 2048])
def test_logprobs_of_the_prompt_equal_a_full_forward_pass(each_subject: Subject, budget: int):
    engine = each_subject.engine(max_num_batched_tokens=budget)
    (prompt,) = prompts(1, vocab_size=each_subject.vocab_size, shortest=60)
    run_alone(engine, prompt=prompt, max_tokens=1)  # what it leaves in the cache must not keep tokens from being scored
    for i, max_tokens in enumerate((1, 0)):
        engine.add(request(str(i), prompt, max_tokens=max_tokens, prompt_logprobs=2, logprobs=1))
    engine.add(request("one", prompt[:1], max_tokens=0, prompt_logprobs=2))
    found = finish(engine)
    assert found["one"] == [Delta("one", prompt_logprobs=(None,), finish_reason="length")]
    assert tokens_of(found["0"]) == each_subject.greedy(prompt, 1)
    assert tokens_of(found["1"]) == []
    expected_TV = each_subject.logprobs(prompt)
    for deltas in (found["0"], found["1"]):
        (delta,) = deltas
        assert delta.finish_reason == "length"
        assert delta.prompt_logprobs[0] is None
        assert len(delta.prompt_logprobs) == len(prompt)
        for token, logprob, expected_V in zip(prompt[1:], delta.prompt_logprobs[1:], expected_TV[:-1], strict=True):
            assert logprob is not None
            assert logprob.token_id == token
            assert logprob.logprob == pytest.approx(float(expected_V[token]), abs=1e-4)
            assert [token for token, _ in logprob.top] == expected_V.topk(2).indices.tolist()


def test_a_seed_gives_the_same_tokens_alone_in_a_batch_and_after_making_room(subject: Subject, scarce: dict):
    given = prompts(10, vocab_size=subject.vocab_size, shortest=5, longest=40)
    settings = [
        {
            "temperature": 1.0,
            "top_p": 0.9 if i % 2 else 1.0,
            "top_k": 20 if i % 3 else 0,
            "seed": i % 4,
            "max_tokens": 50,
        }
        for i in range(10)
    ]
    roomy, narrow = subject.engine(), subject.engine(**scarce, max_num_batched_tokens=9)
    alone = {str(i): tokens_of(run_alone(roomy, prompt=given[i], **settings[i])) for i in range(10)}
    for engine in (roomy, narrow):
        for i, prompt in enumerate(given):
            engine.add(request(str(i), prompt, **settings[i]))
        assert {id: tokens_of(deltas) for id, deltas in finish(engine).items()} == alone
    assert narrow.stats.preemptions
    other = run_alone(roomy, prompt=given[0], **settings[0] | {"seed": 77})
    assert tokens_of(other) != alone["0"]


def test_without_a_seed_draws_differ(subject: Subject):
    engine = subject.engine()
    drawn = {tuple(tokens_of(run_alone(engine, prompt=[5, 6], temperature=1.0, max_tokens=30))) for _ in range(3)}
    assert len(drawn) == 3


def across_tokens(tokenizer: Tokenizer, tokens: list[int], text: str) -> str:
    """A piece of a text that lies in no single token."""
    pieces = [tokenizer.decode([token]) for token in tokens]
    for start in range(8, len(text) - 3):
        stop = text[start : start + 3]
        if "\ufffd" not in stop and not any(stop in piece for piece in pieces) and text.index(stop) == start:
            return stop
    raise AssertionError("this text has none")


def test_stop_strings_end_a_sequence_even_across_tokens(subject: Subject):
    engine = subject.engine()
    whole = run_alone(engine, prompt=[5, 17, 200], max_tokens=60, ignore_eos=True)
    text = text_of(whole)
    stop = across_tokens(engine.tokenizer, tokens_of(whole), text)
    deltas = run_alone(engine, prompt=[5, 17, 200], max_tokens=60, ignore_eos=True, stop=("not in it", stop))
    assert text_of(deltas) == text[: text.index(stop)]
    assert deltas[-1].finish_reason == "stop"
    assert tokens_of(deltas) == tokens_of(whole)[: len(deltas)]
    assert len(deltas) < 60
    held = run_alone(engine, prompt=[5, 17, 200], max_tokens=60, ignore_eos=True, stop=(stop + "\x00",))
    assert text_of(held) == text  # what looked like the beginning of the stop is given out after all


def test_tokens_that_end_a_sequence(subject: Subject):
    engine = subject.engine()
    whole = tokens_of(run_alone(engine, prompt=[5, 17, 200], max_tokens=30, ignore_eos=True))
    stop = next(token for i, token in enumerate(whole) if i > 3 and token not in whole[:i])
    deltas = run_alone(engine, prompt=[5, 17, 200], max_tokens=30, stop_token_ids=(stop,), ignore_eos=True)
    assert tokens_of(deltas) == whole[: whole.index(stop) + 1]
    assert deltas[-1].finish_reason == "stop"
    assert text_of(deltas) == text_of(
        run_alone(engine, prompt=[5, 17, 200], max_tokens=len(deltas) - 1, ignore_eos=True)
    )  # of the token that ends it no text is given

    ending = Engine(load_model(subject.folder), engine.tokenizer, EngineConfig(), end_ids=[stop])
    assert tokens_of(run_alone(ending, prompt=[5, 17, 200], max_tokens=30)) == whole[: whole.index(stop) + 1]
    assert tokens_of(run_alone(ending, prompt=[5, 17, 200], max_tokens=30, ignore_eos=True)) == whole


def test_further_end_tokens_come_with_the_folder(subject: Subject, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in subject.folder.iterdir():
        (folder / file.name).symlink_to(file)
    engine = subject.engine()
    whole = tokens_of(run_alone(engine, prompt=[5, 17, 200], max_tokens=30, ignore_eos=True))
    stop = next(token for i, token in enumerate(whole) if i > 3 and token not in whole[:i])
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [0, {stop}]}}')
    ending = load_engine(folder, EngineConfig(device="cpu"))
    assert tokens_of(run_alone(ending, prompt=[5, 17, 200], max_tokens=30)) == whole[: whole.index(stop) + 1]


def test_a_full_context_ends_a_sequence(subject: Subject):
    engine = subject.engine()
    deltas = run_alone(engine, prompt=[3] * 10, max_tokens=1000, ignore_eos=True)
    assert len(tokens_of(deltas)) == MAX_TOKENS - 10
    assert deltas[-1].finish_reason == "length"
    short = subject.engine(max_model_len=20)
    assert len(tokens_of(run_alone(short, prompt=[3] * 10, max_tokens=1000, ignore_eos=True))) == 10


def test_an_aborted_request_frees_its_slot_at_once(subject: Subject):
    engine = subject.engine(max_num_seqs=2)
    given = prompts(3, vocab_size=subject.vocab_size, shortest=5, longest=20)
    for i, prompt in enumerate(given):
        engine.add(request(str(i), prompt, max_tokens=30, ignore_eos=True))
    engine.step()
    assert (engine.stats.running, engine.stats.waiting) == (2, 1)
    engine.abort("0")
    engine.abort("0")
    engine.abort("never heard of")
    assert engine.stats.running == 1
    assert {delta.id for delta in engine.step()} == {"1", "2"}
    engine.abort("1")
    assert tokens_of(finish(engine)["2"]) == subject.greedy(given[2], 30)[1:]
    engine.add(request("0", given[0], max_tokens=1))  # its id can be used again
    assert finish(engine)


def test_requests_that_cannot_be_taken(subject: Subject):
    engine = subject.engine()
    with pytest.raises(ValueError, match="the prompt has 96 tokens; this model takes 1 to 95"):
        engine.add(request("a", [1] * 96))
    with pytest.raises(ValueError, match="the prompt has 0 tokens"):
        engine.add(request("a", []))
    with pytest.raises(ValueError, match=f"token {subject.vocab_size}: this model has the tokens 0 to"):
        engine.add(request("a", [1, subject.vocab_size]))
    with pytest.raises(ValueError, match="token -1"):
        engine.add(request("a", [1], stop_token_ids=(-1,)))
    assert not engine.has_work
    engine.add(request("a", [1] * 96, max_tokens=0, prompt_logprobs=0))
    with pytest.raises(ValueError, match="'a': is already in use"):
        engine.add(request("a", [1]))
    assert len(finish(engine)["a"][0].prompt_logprobs) == 96


def test_a_sequence_that_the_device_has_no_memory_for_ends_with_an_error(
    subject: Subject, scarce: dict, monkeypatch: pytest.MonkeyPatch
):
    fake_driver.use(FakeDriver(most_pages=5), monkeypatch)  # of the 18 in the budget; one is the scratch slot's
    engine = subject.engine(**scarce)
    for id, prompt in (("fits", [5] * 10), ("grows", [6] * 20), ("never", [7] * 60)):
        engine.add(request(id, prompt, max_tokens=30, ignore_eos=True))
    found = finish(engine)
    assert {id: deltas[-1].finish_reason for id, deltas in found.items()} == {
        "fits": "length",
        "grows": "error",
        "never": "error",
    }
    assert "less memory" in (found["never"][0].error or "")
    assert len(tokens_of(found["grows"])) > 20
    assert engine.stats.running == engine.stats.waiting == 0
    assert tokens_of(run_alone(engine, prompt=[5] * 10, max_tokens=30)) == subject.greedy([5] * 10, 30)


def test_engines_that_cannot_be_made(subject: Subject, scarce: dict):
    with pytest.raises(ValueError, match=r"kv_cache_memory_bytes=1: .* needs at least"):
        subject.engine(**scarce | {"kv_cache_memory_bytes": 1})
    with pytest.raises(ValueError, match=r"max_model_len=96: .* holds a sequence of"):
        subject.engine(**scarce | {"kv_cache_memory_bytes": 4 * 2 * 4096, "max_model_len": 96})
    assert subject.engine(**scarce | {"kv_cache_memory_bytes": 4 * 2 * 4096}).max_model_len < 96
    with pytest.raises(ValueError, match="max_model_len=97: this model takes 96 tokens at most"):
        subject.engine(max_model_len=97)
    config = ModelConfig(
        vocab_size=280, d_model=16, n_heads=2, d_ff=16, blocks_per_stack=1, attention_mode="bidirectional"
    )
    with pytest.raises(ValueError, match="attention_mode=bidirectional"):
        Engine(Rack(config), load_tokenizer(subject.folder), EngineConfig())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"max_num_batched_tokens": 3}, "max_num_batched_tokens=3: must be at least max_num_seqs=64"),
        ({"dtype": "float8"}, "dtype='float8'"),
    ],
)
def test_wrong_settings_of_an_engine_are_named(wrong: dict, message: str):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**wrong)


def test_a_model_that_gives_no_numbers_ends_its_requests_with_an_error(subject: Subject):
    model = load_model(subject.folder)
    with torch.no_grad():
        model.blocks[1].mlp_norm.weight[0] = torch.nan
    engine = Engine(model, load_tokenizer(subject.folder), EngineConfig())
    (delta,) = run_alone(engine, prompt=[1, 2], max_tokens=5, logprobs=1)
    assert delta.finish_reason == "error"
    assert "not numbers" in (delta.error or "")
    assert not engine.has_work


def test_in_bf16_tokens_differ_from_those_alone_only_at_near_ties(subject: Subject):
    engine = subject.engine(dtype="bfloat16")
    model = load_model(subject.folder, dtype=torch.bfloat16)
    given = prompts(8, vocab_size=subject.vocab_size)
    for i, prompt in enumerate(given):
        engine.add(request(str(i), prompt, max_tokens=20, ignore_eos=True))
    found = finish(engine)
    for i, prompt in enumerate(given):
        assert gaps(model, prompt, tokens_of(found[str(i)])).max() < 0.1


@pytest.mark.parametrize("pages_from", ["host", "driver"])
def test_nothing_is_lost_whatever_comes_and_goes(
    subject_of: Callable[[str], Subject], scarce: dict, pages_from: str, monkeypatch: pytest.MonkeyPatch
):
    if pages_from == "driver":  # mapped in a thread, and those that are taken away turn NaN; with a step ahead
        fake_driver.use(FakeDriver(most_pages=1000), monkeypatch)
    subject = subject_of("llama gqa tied")
    ahead = pages_from == "driver"
    engine = subject.engine(**scarce, max_num_batched_tokens=23, async_scheduling=ahead)
    chance = random.Random(1)
    floor = engine.stats.kv_mapped_bytes
    shared = prompts(3, vocab_size=subject.vocab_size, shortest=45, longest=60, seed=5)
    found: dict[str, list[Delta]] = {}
    wanted, aborted = {}, set()
    made = 0
    while made < 300 or engine.has_work:
        for _ in range(chance.choice([0, 0, 1, 3]) if made < 300 else 0):
            prompt = chance.choice(shared)[: chance.randint(1, 60)] + [chance.randrange(1, 280) for _ in range(5)]
            sampling = {"temperature": chance.choice([0.0, 1.0]), "seed": made, "max_tokens": chance.randint(1, 30)}
            wanted[str(made)] = request(str(made), prompt, **sampling, prompt_logprobs=chance.choice([None, None, 1]))
            engine.add(wanted[str(made)])
            made += 1
        if chance.random() < 0.05 and (
            living := set(wanted) - aborted - {id for id in found if found[id][-1].finish_reason}
        ):
            aborted.add(id := chance.choice(sorted(living)))
            engine.abort(id)
        for delta in engine.step():
            assert delta.id not in aborted
            assert not (delta.id in found and found[delta.id][-1].finish_reason)
            found.setdefault(delta.id, []).append(delta)
        stats = engine.stats
        assert floor <= stats.kv_used_bytes <= stats.kv_mapped_bytes <= stats.kv_budget_bytes
    stats = engine.stats
    assert stats.preemptions > 10
    assert stats.prefix_hit_tokens > 1000
    assert len(aborted) > 10
    for id in set(wanted) - aborted:
        prompt, tokens = list(wanted[id].prompt), tokens_of(found[id])
        sampling = wanted[id].sampling
        ended = tokens[-1] == subject.eos_id
        assert len(tokens) == sampling.max_tokens or ended
        assert found[id][-1].finish_reason == ("stop" if ended else "length")
        scores = [logprob.logprob for logprob in found[id][0].prompt_logprobs if logprob]
        assert len(scores) == (0 if sampling.prompt_logprobs is None else len(prompt) - 1)
        if sampling.greedy:
            logits_TV = subject.logprobs([*prompt, *tokens])
            expected = logits_TV.gather(1, torch.tensor([*prompt[1:], *tokens])[:, None])[: len(scores), 0]
            assert torch.allclose(torch.tensor(scores), expected, atol=1e-4)
            assert tokens == logits_TV[len(prompt) - 1 : -1].argmax(-1).tolist()
        elif chance.random() < 0.2:
            alone = replace(wanted[id], id="alone")
            engine.add(alone)
            assert tokens_of(finish(engine)["alone"]) == tokens
    assert (engine.stats.running, engine.stats.waiting) == (0, 0)
    engine.reclaim()
    assert engine.stats.kv_mapped_bytes == engine.stats.kv_used_bytes == floor
