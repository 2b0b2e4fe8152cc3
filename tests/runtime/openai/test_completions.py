"""Completions over a real engine: prompts of every kind, echo, log-probabilities, streams."""

import json
from typing import Any

import httpx2
import pytest
import torch

from raygrow.nn.rack import Rack
from raygrow.text.tokenizer import Tokenizer
from tests.runtime.openai.local import LocalModel

PROMPT = "def grow("


def complete(url: str, **body: Any) -> dict[str, Any]:
    response = httpx2.post(f"{url}/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def events(url: str, route: str = "completions", **body: Any) -> list[dict[str, Any]]:
    with httpx2.stream("POST", f"{url}/v1/{route}", json={"stream": True, **body}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        parts = "".join(response.iter_text()).split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


@torch.no_grad()
def forward(rack: Rack, ids: list[int]) -> torch.Tensor:
    """Log-probabilities by a full forward pass, `(T, V)`."""
    return rack(torch.tensor([ids]))[0].log_softmax(-1)


def greedy(rack: Rack, ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        ids = [*ids, int(forward(rack, ids)[-1].argmax())]
    return ids[-count:]


def test_every_kind_of_prompt_is_continued_as_the_model_does(url: str, rack: Rack, tokenizer: Tokenizer) -> None:
    ids, other = tokenizer.encode(PROMPT), tokenizer.encode("the model")
    expected = tokenizer.decode(greedy(rack, ids, 6))
    options = {"temperature": 0, "max_tokens": 6}
    for prompt in (PROMPT, ids, [PROMPT], [ids]):
        answer = complete(url, prompt=prompt, **options)
        assert [choice["text"] for choice in answer["choices"]] == [expected]
        assert answer["usage"]["prompt_tokens"] == len(ids)
        assert answer["usage"]["completion_tokens"] == 6
        assert answer["object"] == "text_completion"
        assert answer["choices"][0]["finish_reason"] == "length"
    for prompt in ([PROMPT, "the model"], [ids, other]):
        answer = complete(url, prompt=prompt, n=2, **options)
        texts = [choice["text"] for choice in sorted(answer["choices"], key=lambda choice: choice["index"])]
        assert texts == [expected] * 2 + [tokenizer.decode(greedy(rack, other, 6))] * 2
        assert answer["usage"]["prompt_tokens"] == len(ids) + len(other)
    assert len(complete(url, prompt="", **options)["choices"][0]["text"]) > 0
    assert complete(url, prompt=PROMPT)["usage"]["completion_tokens"] <= 16


def test_scores_of_an_echo_are_those_of_a_full_forward_pass(url: str, rack: Rack, tokenizer: Tokenizer) -> None:
    prompts = [tokenizer.encode(text) for text in ("def grow(model, factor)", "return the grown \u4f60\u597d")]
    answer = complete(url, prompt=prompts, max_tokens=1, logprobs=1, echo=True, temperature=0)
    for choice, ids in zip(answer["choices"], prompts, strict=True):
        found = choice["logprobs"]
        assert {len(each) for each in found.values()} == {len(ids) + 1}
        assert found["token_logprobs"][0] is None
        assert found["top_logprobs"][0] is None
        whole = [*ids, *greedy(rack, ids, 1)]
        scores = forward(rack, whole)
        for place in range(1, len(whole)):
            score, top = found["token_logprobs"][place], found["top_logprobs"][place]
            assert score == pytest.approx(float(scores[place - 1, whole[place]]), abs=1e-4)
            best = scores[place - 1].argmax() == whole[place]
            assert (score == max(top.values())) == bool(best)  # exactly: this is how the harness asks
            assert len(top) == (1 if best else 2)
        text = choice["text"]
        assert text.startswith(tokenizer.decode(ids))
        assert found["text_offset"] == sorted(found["text_offset"])
        for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
            assert token.startswith("bytes:") or text[offset:].startswith(token)


@pytest.mark.parametrize("as_text", [True, False])
def test_places_after_special_tokens_are_those_in_the_text(url: str, tokenizer: Tokenizer, as_text: bool) -> None:
    prompt = "the <|endoftext|>model, <|endoftext|><|endoftext|>grown"
    ids = tokenizer.encode(prompt, parse_special=True)
    assert ids.count(tokenizer.eos_id) == 3
    given = prompt if as_text else ids
    (choice,) = complete(url, prompt=given, max_tokens=5, echo=True, logprobs=0, ignore_eos=True)["choices"]
    echoed = prompt if as_text else prompt.replace("<|endoftext|>", "")
    found, text = choice["logprobs"], choice["text"]
    assert text.startswith(echoed)
    for token, offset in list(zip(found["tokens"], found["text_offset"], strict=True))[: len(ids)]:
        assert text[offset:].startswith(token) == (as_text or token != "<|endoftext|>")
    assert found["text_offset"][len(ids)] == len(echoed)


def test_scoring_alone_adds_nothing(url: str, tokenizer: Tokenizer) -> None:
    answer = complete(url, prompt=PROMPT, max_tokens=0, echo=True, logprobs=0)
    (choice,) = answer["choices"]
    assert choice["text"] == PROMPT
    assert len(choice["logprobs"]["tokens"]) == len(tokenizer.encode(PROMPT))
    assert answer["usage"]["completion_tokens"] == 0
    assert complete(url, prompt=PROMPT, max_tokens=0, echo=True)["choices"][0]["logprobs"] is None


def test_a_stream_adds_up_to_the_whole(url: str) -> None:
    body = {"prompt": [PROMPT, "the"], "n": 2, "seed": 7, "max_tokens": 12, "echo": True, "logprobs": 2}
    whole = complete(url, **body)
    chunks = events(url, **body, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] | {"prompt_tokens_details": None} == whole["usage"] | {"prompt_tokens_details": None}
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1
    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
        for name, values in choice["logprobs"].items():
            joined = [value for part in parts for value in part["logprobs"][name]]
            if name in ("tokens", "text_offset"):
                assert joined == values
            else:
                assert len(joined) == len(values)
    assert all("usage" not in chunk for chunk in events(url, **body))


def test_seeds_decide_and_the_answers_of_one_call_differ(url: str) -> None:
    body = {"prompt": PROMPT, "n": 3, "seed": 11, "max_tokens": 12}
    first, second = (complete(url, **body)["choices"] for _ in range(2))
    assert [choice["text"] for choice in first] == [choice["text"] for choice in second]
    assert len({choice["text"] for choice in first}) == 3
    alone = complete(url, prompt=PROMPT, seed=11, max_tokens=12)
    assert alone["choices"][0]["text"] == first[0]["text"]


def test_stop_texts_end_an_answer_and_are_left_out(url: str, rack: Rack, tokenizer: Tokenizer) -> None:
    text = tokenizer.decode(greedy(rack, tokenizer.encode(PROMPT), 12))
    stop = text[4:6]
    for given in (stop, [stop, "never seen"]):
        (choice,) = complete(url, prompt=PROMPT, temperature=0, max_tokens=12, stop=given)["choices"]
        assert choice["text"] == text[: text.index(stop)]
        assert choice["finish_reason"] == "stop"
    chunks = events(url, prompt=PROMPT, temperature=0, max_tokens=12, stop=stop)
    assert "".join(part["text"] for chunk in chunks for part in chunk["choices"]) == text[: text.index(stop)]


def test_an_answer_ends_where_the_context_does(url: str, model: LocalModel, tokenizer: Tokenizer) -> None:
    ids = (tokenizer.encode(PROMPT) * 400)[: model.max_model_len - 3]
    answer = complete(url, prompt=ids, max_tokens=1000, ignore_eos=True)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3
