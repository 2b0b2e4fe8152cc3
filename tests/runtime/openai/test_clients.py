"""openai-python as it is, against a real server over a real engine."""

from collections.abc import Iterator

import openai
import pytest

from raygrow.runtime.openai.app import ApiConfig, make_app
from raygrow.text.tokenizer import Tokenizer
from tests.runtime.openai.local import Double, LocalModel, served

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "grow"}]
GREEDY = {"temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def client(model: LocalModel) -> Iterator[openai.OpenAI]:
    with served(make_app({model.id: model}, ApiConfig(api_key="key"))) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0)


def test_models(client: openai.OpenAI, model: LocalModel) -> None:
    assert [entry.id for entry in client.models.list()] == [model.id]
    assert client.models.retrieve(model.id).owned_by == "raygrow"


def test_chat(client: openai.OpenAI, model: LocalModel, tokenizer: Tokenizer) -> None:
    answer = client.chat.completions.create(model=model.id, messages=MESSAGES, n=2, **GREEDY)
    first, second = answer.choices
    assert first.message.role == "assistant"
    assert first.message.content == second.message.content
    assert first.finish_reason == "length"
    assert answer.usage.completion_tokens == 16
    prompt = "Be brief.\n\nUser: grow\nAssistant:"
    assert answer.usage.prompt_tokens == len(tokenizer.encode(prompt))
    same = client.completions.create(model=model.id, prompt=prompt, **GREEDY)
    assert same.choices[0].text == first.message.content
    parts = [{"type": "text", "text": "gr"}, {"type": "text", "text": "ow"}]
    split = [MESSAGES[0] | {"role": "developer"}, {"role": "user", "content": parts}]
    again = client.chat.completions.create(model=model.id, messages=split, temperature=0, max_completion_tokens=8)
    assert again.choices[0].message.content == first.message.content


def test_chat_stream(client: openai.OpenAI, model: LocalModel) -> None:
    body = {"model": model.id, "messages": MESSAGES, "n": 2, "seed": 3, "max_tokens": 12}
    whole = client.chat.completions.create(**body)
    chunks = list(client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    for choice in whole.choices:
        deltas = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert deltas[0].delta.role == "assistant"
        assert all(part.delta.role is None for part in deltas[1:])
        assert "".join(part.delta.content or "" for part in deltas) == choice.message.content
        assert deltas[-1].finish_reason == choice.finish_reason


def test_chat_logprobs(client: openai.OpenAI, model: LocalModel) -> None:
    body = {"model": model.id, "messages": MESSAGES, "logprobs": True, "top_logprobs": 3, **GREEDY}
    (choice,) = client.chat.completions.create(**body).choices
    assert len(choice.logprobs.content) == 8
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob
        assert token.top_logprobs[0].token == token.token
    spelled = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
    assert spelled.decode(errors="replace") == choice.message.content
    chunks = client.chat.completions.create(**body, stream=True)
    streamed = [token for chunk in chunks for part in chunk.choices for token in part.logprobs.content]
    assert [token.bytes for token in streamed] == [token.bytes for token in choice.logprobs.content]
    no_top = client.chat.completions.create(model=model.id, messages=MESSAGES, logprobs=True, **GREEDY)
    assert no_top.choices[0].logprobs.content[0].top_logprobs == []


def test_completion_stream_and_logprobs(client: openai.OpenAI, model: LocalModel) -> None:
    body = {"model": model.id, "prompt": "def grow(", "logprobs": 2, "echo": True, **GREEDY}
    (choice,) = client.completions.create(**body).choices
    assert choice.text.startswith("def grow(")
    assert choice.logprobs.token_logprobs[0] is None
    assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset)
    streamed = client.completions.create(**body, stream=True)
    assert "".join(part.text for chunk in streamed for part in chunk.choices) == choice.text


def test_stop_and_seed(client: openai.OpenAI, model: LocalModel) -> None:
    body = {"model": model.id, "messages": MESSAGES, "max_tokens": 20}
    texts = [client.chat.completions.create(**body, seed=5).choices[0].message.content for _ in range(2)]
    assert texts[0] == texts[1]
    (choice,) = client.chat.completions.create(**body, seed=5, stop=[texts[0][3:5], "other"]).choices
    assert choice.message.content == texts[0][: texts[0].index(texts[0][3:5])]
    assert choice.finish_reason == "stop"


def test_errors_are_the_clients_own(client: openai.OpenAI, model: LocalModel) -> None:
    with pytest.raises(openai.BadRequestError, match="top_p: ") as caught:
        client.chat.completions.create(model=model.id, messages=MESSAGES, top_p=3)
    assert caught.value.param == "top_p"
    with pytest.raises(openai.NotFoundError, match="no 'other'") as caught:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_too_many_requests_are_tried_again(double_url: str, double: Double) -> None:
    client = openai.OpenAI(base_url=f"{double_url}/v1", api_key="none")
    body = {"model": double.id, "messages": MESSAGES}
    double.refusals = 1
    assert client.chat.completions.create(**body).choices[0].message.content == "Grown \u4f60\u597d."
    assert len(double.asked) == 2
    double.refusals = 1
    with pytest.raises(openai.RateLimitError):
        client.with_options(max_retries=0).chat.completions.create(**body)


def test_an_answer_that_breaks_off_raises_in_the_middle(double_url: str, double: Double) -> None:
    client = openai.OpenAI(base_url=f"{double_url}/v1", api_key="none", max_retries=0)
    double.end, double.pause = "error", 0.02
    stream = client.completions.create(model=double.id, prompt="a", stream=True)
    assert next(stream).choices[0].text == "Gro"
    with pytest.raises(openai.APIError, match="the replica was lost"):
        list(stream)
