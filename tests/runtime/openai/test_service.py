"""What surrounds answers: errors, limits, the key, figures, clients that hang up; over a double that obeys."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest
from fastapi import FastAPI

from raygrow.runtime.openai import http
from raygrow.runtime.openai.app import ApiConfig, make_app
from raygrow.runtime.openai.protocol import ChatRequest, CompletionRequest, GenerationRequest, Message, Only
from raygrow.text.tokenizer import Tokenizer
from tests.runtime.openai.local import Double, LocalModel, served

BODY = {"prompt": "a"}
MESSAGES = [{"role": "user", "content": "hi"}]
DEEP = json.loads("[" * 600 + "]" * 600)


def part(**fields: object) -> dict[str, object]:
    """A message of one part."""
    return {"role": "user", "content": [fields]}


def refused(response: httpx2.Response, status: int) -> dict[str, str]:
    """The error of a response, after a look at its shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [("completions", {"prompt": "a" * 2000}, "prompt"), ("chat/completions", {"messages": MESSAGES * 200}, "messages")],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_context_that_is_shorter_than_the_server_thinks(
    model: LocalModel, route: str, body: dict, param: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "max_model_len", 10**6)
    with served(make_app({model.id: model})) as url:
        error = refused(httpx2.post(f"{url}/v1/{route}", json={**body, "stream": stream}), 400)
    assert (error["param"], error["code"]) == (param, "context_length_exceeded")
    assert "tokens; this model takes 1 to 1023" in error["message"]


def eventually(holds: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("completions", {"prompt": 3}, "prompt"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": [[]]}, "prompt.0"),
        ("completions", {"prompt": [1, -1]}, "prompt.1"),
        ("completions", {"prompt": [10**6]}, "prompt"),
        ("completions", {"prompt": "a" * 100}, "prompt"),
        ("completions", {"prompt": "\ud800"}, "prompt"),
        ("completions", {**BODY, "n": 0}, "n"),
        ("completions", {**BODY, "n": True}, "n"),
        ("completions", {"prompt": ["a"] * 100, "n": 100}, "n"),
        ("completions", {**BODY, "max_tokens": "5"}, "max_tokens"),
        ("completions", {**BODY, "max_tokens": 0}, "max_tokens"),
        ("completions", {**BODY, "temperature": -1}, "temperature"),
        ("completions", {**BODY, "top_p": 0}, "top_p"),
        ("completions", {**BODY, "seed": 2**64}, "seed"),
        ("completions", {**BODY, "stop": [""]}, "stop.0"),
        ("completions", {**BODY, "logprobs": 1000}, "logprobs"),
        ("completions", {**BODY, "best_of": 3}, "best_of"),
        ("completions", {**BODY, "suffix": "b"}, "suffix"),
        ("completions", {**BODY, "stop_token_ids": [10**6]}, "stop_token_ids"),
        ("completions", {**BODY, "presence_penalty": 1.5}, "presence_penalty"),
        ("completions", {**BODY, "logit_bias": {"3": 1}}, "logit_bias"),
        ("completions", {**BODY, "guided_choice": ["yes", "no"]}, "guided_choice"),
        ("completions", {**BODY, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ("completions", {**BODY, "bad_words": ["a"]}, "bad_words"),
        ("completions", {**BODY, "allowed_token_ids": [1]}, "allowed_token_ids"),
        ("completions", {**BODY, "truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
        ("completions", {**BODY, "include_stop_str_in_output": True}, "include_stop_str_in_output"),
        ("completions", {**BODY, "skip_special_tokens": False}, "skip_special_tokens"),
        ("completions", {**BODY, "prompt_embeds": "a"}, "prompt_embeds"),
        ("completions", {**BODY, "stream_options": {"include_usage": True}}, "stream_options"),
        ("chat/completions", {}, "messages"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": [{"content": "a"}]}, "messages.0.role"),
        ("chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ("chat/completions", {"messages": MESSAGES, "top_logprobs": 3}, "top_logprobs"),
        ("chat/completions", {"messages": MESSAGES, "max_completion_tokens": 0}, "max_completion_tokens"),
        ("chat/completions", {"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools"),
        ("chat/completions", {"messages": MESSAGES, "tool_choice": "required"}, "tool_choice"),
        ("chat/completions", {"messages": MESSAGES, "modalities": ["text", "audio"]}, "modalities"),
        ("chat/completions", {"messages": MESSAGES, "chat_template": "{{ 1 }}"}, "chat_template"),
        ("chat/completions", {"messages": MESSAGES, "continue_final_message": True}, "continue_final_message"),
        ("chat/completions", {"messages": MESSAGES, "response_format": {"type": "json_object"}}, "response_format"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a" * 100}]}, "messages"),
        ("chat/completions", {"messages": [part(type="text", content="a")]}, "messages.0.content.0.text"),
        ("chat/completions", {"messages": [part(type="refusal", text="a")]}, "messages.0.content.0.refusal"),
        ("chat/completions", {"messages": [part(type="image_url", text="a")]}, "messages.0.content.0.type"),
        ("chat/completions", {"messages": [{**MESSAGES[0], "name": DEEP}]}, "messages"),
        ("chat/completions", {"messages": MESSAGES, "chat_template_kwargs": {"a": DEEP}}, "messages"),
    ],
)
def test_a_wrong_value_is_named(double_url: str, route: str, body: dict[str, object], param: str) -> None:
    headers = {"content-type": "application/json"}
    response = httpx2.post(f"{double_url}/v1/{route}", content=json.dumps(body), headers=headers)
    error = refused(response, 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"null", b'{"prompt": NaN}', b'{"temperature": 1e999}', b"[" * 10_000, b"\xff\xfe"]
)
def test_what_is_no_object_is_refused(double_url: str, body: bytes) -> None:
    for route in ("v1/completions", "v1/chat/completions", "tokenize", "detokenize"):
        headers = {"content-type": "application/json"}
        refused(httpx2.post(f"{double_url}/{route}", content=body, headers=headers), 400)
    error = refused(httpx2.post(f"{double_url}/v1/completions", content=json.dumps(BODY)), 400)
    assert "Content-Type: application/json" in error["message"]


def test_fields_nobody_knows_and_fields_that_ask_for_nothing_are_fine(double_url: str, double: Double) -> None:
    harmless = {"presence_penalty": 0.0, "repetition_penalty": 1.0, "logit_bias": None, "suffix": None, "user": "me"}
    harmless |= {"skip_special_tokens": True, "bad_words": [], "guided_json": None}
    body = {**BODY, **harmless, "best_of": 1, "logprobs": None, "never_seen": {"a": [1]}, "top_k": -1}
    response = httpx2.post(f"{double_url}/v1/completions", json=body)
    assert response.json()["choices"][0]["text"] == "Grown \u4f60\u597d."
    sampling = double.asked[0].sampling
    assert (sampling.top_k, sampling.max_tokens, sampling.temperature, sampling.logprobs) == (0, 16, 1, None)


@pytest.mark.parametrize(("request_type", "body"), [(CompletionRequest, BODY), (ChatRequest, {"messages": MESSAGES})])
def test_what_is_not_offered_may_be_null(request_type: type[GenerationRequest], body: dict[str, object]) -> None:
    kinds = request_type.model_fields.items()
    nulls = {name: None for name, kind in kinds if any(isinstance(mark, Only) for mark in kind.metadata)}
    assert len(nulls) > 18
    request_type.model_validate({**body, **nulls})


def test_an_answer_that_comes_back_has_only_the_fields_that_say_something() -> None:
    sent = {"role": "assistant", "content": None, "refusal": None, "tool_calls": None, "name": "a"}
    assert Message.model_validate(sent).for_template == {"role": "assistant", "content": "", "name": "a"}


def test_every_part_of_a_message_is_read() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}, {"type": "output_text", "text": ""}]
    message = Message.model_validate({"role": "assistant", "content": parts})
    assert message.for_template == {"role": "assistant", "content": "ab"}


def test_wrong_addresses_and_models(double_url: str) -> None:
    assert refused(httpx2.get(f"{double_url}/v2"), 404)["type"] == "not_found_error"
    refused(httpx2.get(f"{double_url}/v1/completions"), 405)
    assert refused(httpx2.get(f"{double_url}/v1/models/other"), 404)["code"] == "model_not_found"
    error = refused(httpx2.post(f"{double_url}/v1/completions", json={**BODY, "model": "other"}), 404)
    assert error["param"] == "model"
    assert "double" in error["message"]


def test_several_models_answer_by_name(model: LocalModel, double: Double) -> None:
    with served(make_app({model.id: model, double.id: double})) as url:
        listed = httpx2.get(f"{url}/v1/models").json()
        assert [entry["id"] for entry in listed["data"]] == ["tiny/model", "double"]
        assert httpx2.get(f"{url}/v1/models/tiny/model").json() == listed["data"][0]
        assert refused(httpx2.post(f"{url}/v1/completions", json=BODY), 400)["param"] == "model"
        answer = httpx2.post(f"{url}/v1/completions", json={**BODY, "model": "double"}).json()
        assert answer["model"] == "double"
        assert httpx2.get(f"{url}/tokenizer_info").json()["model"] == "tiny/model"
        assert httpx2.get(f"{url}/tokenizer_info", params={"model": "double"}).json()["model"] == "double"


def test_key_is_asked_for_except_for_the_page_and_health(double: Double) -> None:
    with served(make_app({double.id: double}, ApiConfig(api_key="se\u00e9cret"))) as url:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic se\u00e9cret".encode()}):
            for path in ("v1/models", "metrics", "nowhere", "openapi.json"):
                response = httpx2.get(f"{url}/{path}", headers=headers)
                assert refused(response, 401)["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
            refused(httpx2.post(f"{url}/v1/completions", headers=headers, json=BODY), 401)
        assert not double.asked
        assert httpx2.get(url).status_code == httpx2.get(f"{url}/health").status_code == 200
        right = {"authorization": "Bearer se\u00e9cret".encode()}
        assert httpx2.post(f"{url}/v1/completions", headers=right, json=BODY).status_code == 200


def test_the_page_and_health_are_open_wherever_the_app_is(double: Double) -> None:
    app = make_app({double.id: double}, ApiConfig(api_key=" key\n"))  # as files give it
    root = FastAPI()
    root.mount("/llm", app)
    with served(root) as url:
        for path in ("llm/", "llm/health"):
            assert httpx2.get(f"{url}/{path}").status_code == 200
        assert httpx2.get(f"{url}/llm", follow_redirects=True).url == f"{url}/llm/"
        refused(httpx2.get(f"{url}/llm/v1/models"), 401)
        right = {"authorization": "Bearer key"}
        assert httpx2.get(f"{url}/llm/v1/models", headers=right).status_code == 200
    assert "key" not in repr(ApiConfig(api_key="key")).replace("api_key", "")


def test_a_body_that_does_not_come_is_not_waited_for(double_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "SECONDS_TO_SEND", 0.2)

    def slowly() -> Iterator[bytes]:
        yield b'{"prompt":'
        time.sleep(0.6)
        yield b'"a"}'

    refused(httpx2.post(f"{double_url}/v1/completions", content=slowly()), 408)


def test_bodies_that_are_too_large_are_refused_whether_or_not_they_say_so(double: Double) -> None:
    with served(make_app({double.id: double}, ApiConfig(max_request_bytes=200))) as url:
        large = json.dumps({"prompt": "a" * 300}).encode()
        assert refused(httpx2.post(f"{url}/v1/completions", content=large), 413)["code"] == "request_too_large"
        parts = (large[at : at + 50] for at in range(0, len(large), 50))  # sent without a length
        refused(httpx2.post(f"{url}/v1/completions", content=parts), 413)
        assert httpx2.post(f"{url}/v1/completions", json=BODY).status_code == 200


def test_answers_are_no_longer_than_the_server_allows(double: Double) -> None:
    with served(make_app({double.id: double}, ApiConfig(max_tokens=5))) as url:
        httpx2.post(f"{url}/v1/completions", json={**BODY, "max_tokens": 50})
        httpx2.post(f"{url}/v1/chat/completions", json={"messages": MESSAGES})
    assert [request.sampling.max_tokens for request in double.asked] == [5, 5]


def test_limits_that_make_no_sense_are_refused(double: Double) -> None:
    for wrong in ({"max_request_bytes": 0}, {"max_tokens": 0}, {"max_choices": -1}, {"api_key": " "}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ApiConfig(**wrong)
    with pytest.raises(ValueError, match="models"):
        make_app({})


def test_other_pages_may_not_ask_unless_they_are_named(double: Double) -> None:
    asks = {"origin": "https://page.example", "access-control-request-method": "POST"}
    for origins in ((), ("https://page.example",)):
        with served(make_app({double.id: double}, ApiConfig(api_key="key", cors_origins=origins))) as url:
            headers = httpx2.options(f"{url}/v1/completions", headers=asks).headers
            assert headers.get("access-control-allow-origin") == (origins[0] if origins else None)


def test_too_many_requests_are_told_when_to_come_back(double_url: str, double: Double) -> None:
    for body in (BODY, {**BODY, "stream": True}, {**BODY, "n": 3}):
        double.refusals = 1
        response = httpx2.post(f"{double_url}/v1/completions", json=body)
        assert refused(response, 429)["type"] == "rate_limit_error"
        assert response.headers["retry-after"] == "1"
        eventually(lambda: double.open == 0, seconds=1)


@pytest.mark.parametrize("end", ["error", "nothing", "raise"])
def test_an_answer_that_breaks_off_ends_in_an_error(double_url: str, double: Double, end: str) -> None:
    double.end = end
    status = 500 if end == "raise" else 503
    response = httpx2.post(f"{double_url}/v1/completions", json=BODY)
    error = refused(response, status)
    assert error["type"] == "server_error"
    assert response.headers["x-request-id"]
    counted = f'raygrow_requests_total{{route="/v1/completions",status="{status}"}}'
    assert counted in httpx2.get(f"{double_url}/metrics").text
    assert "secret" not in error["message"]
    double.pause = 0.02  # so that the first piece comes alone
    response = httpx2.post(f"{double_url}/v1/chat/completions", json={"messages": MESSAGES, "stream": True})
    assert response.status_code == 200
    *chunks, last, done = [part.removeprefix("data: ") for part in response.text.split("\n\n") if part]
    assert "".join(json.loads(chunk)["choices"][0]["delta"].get("content", "") for chunk in chunks).startswith("Gro")
    assert json.loads(last) == {"error": error}
    assert done == "[DONE]"
    double.end = "stop"
    assert httpx2.post(f"{double_url}/v1/completions", json=BODY).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("begun", [True, False])
def test_a_client_that_hangs_up_frees_its_place(double_url: str, double: Double, stream: bool, begun: bool) -> None:
    double.pieces, double.pause = ["a"] * 1000, 0.1 if begun else 1000.0
    body = {**BODY, "stream": stream, "n": 2}
    call = httpx2.stream("POST", f"{double_url}/v1/completions", json=body, timeout=0.4)
    with suppress(httpx2.ReadTimeout), call as response:
        next(response.iter_text())
    eventually(lambda: len(double.asked) == 2 and double.open == 0, seconds=1)


def test_a_slow_reader_gets_fewer_and_larger_pieces(double_url: str, double: Double) -> None:
    double.pieces = ["a"] * 500  # all at once
    response = httpx2.post(f"{double_url}/v1/completions", json={**BODY, "stream": True})
    chunks = [json.loads(part[6:]) for part in response.text.split("\n\n")[:-2]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "a" * 500
    assert len(chunks) < 10


def test_request_ids_come_back(double_url: str) -> None:
    given = httpx2.post(f"{double_url}/v1/completions", json=BODY, headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    made = {httpx2.get(f"{double_url}/{path}").headers["x-request-id"] for path in ("v1/models", "nowhere")}
    assert len(made) == 2
    odd = httpx2.get(f"{double_url}/health", headers={"x-request-id": "a b\u00fc".encode()}).headers["x-request-id"]
    assert odd.isalnum()


def test_health_says_when_a_model_cannot_answer(double_url: str, double: Double) -> None:
    assert httpx2.get(f"{double_url}/health").json() == {"status": "ok"}
    double.well = False
    assert "the engine is stuck" in refused(httpx2.get(f"{double_url}/health"), 503)["message"]


def test_figures(url: str, model: LocalModel) -> None:
    def figures() -> dict[str, float]:
        lines = httpx2.get(f"{url}/metrics").text.splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    before = figures()
    httpx2.post(f"{url}/v1/completions", json={"prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True, "n": 2})
    httpx2.post(f"{url}/v1/completions", json={"ignore_eos": True})
    httpx2.post(f"{url}/v1/completions", json={"prompt": 3})
    httpx2.get(f"{url}/nowhere")
    after = figures()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    of_model = f'{{model="{model.id}"}}'
    assert grown[f"raygrow_generation_tokens_total{of_model}"] == 8 + 16
    assert grown[f"raygrow_prompt_tokens_total{of_model}"] == 6 + 1
    assert grown[f"raygrow_time_to_first_token_seconds_count{of_model}"] == 3
    assert grown[f"raygrow_time_per_output_token_seconds_count{of_model}"] == 3
    assert grown['raygrow_requests_total{route="/v1/completions",status="200"}'] == 2
    assert grown['raygrow_requests_total{route="/v1/completions",status="400"}'] == 1
    assert grown['raygrow_requests_total{route="other",status="404"}'] == 1
    assert after[f"raygrow_requests_open{of_model}"] == 0
    assert model.stats.running == model.stats.waiting == 0


def test_texts_and_conversations_as_tokens(url: str, tokenizer: Tokenizer) -> None:
    text = "def grow \u4f60"
    shown = httpx2.post(f"{url}/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert shown["tokens"] == tokenizer.encode(text)
    assert shown["count"] == len(shown["tokens"]) == len(shown["token_strs"])
    assert httpx2.post(f"{url}/detokenize", json={"tokens": shown["tokens"]}).json() == {"prompt": text}
    end = httpx2.post(f"{url}/tokenize", json={"prompt": "<|endoftext|>", "add_special_tokens": False}).json()
    assert end["tokens"] == [tokenizer.eos_id]
    chat = httpx2.post(f"{url}/tokenize", json={"messages": MESSAGES}).json()["tokens"]
    assert tokenizer.decode(chat) == "User: hi\nAssistant:"
    refused(httpx2.post(f"{url}/tokenize", json={}), 400)
    refused(httpx2.post(f"{url}/tokenize", json={"prompt": "a", "messages": MESSAGES}), 400)
    assert refused(httpx2.post(f"{url}/detokenize", json={"tokens": [10**6]}), 400)["param"] == "tokens"
    info = httpx2.get(f"{url}/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"], info["chat_template"]) == ("<|endoftext|>", None, None)


def test_the_page_is_served(double_url: str) -> None:
    from raygrow.runtime import openai

    page = httpx2.get(double_url)
    assert page.headers["content-type"].startswith("text/html")
    assert page.text == (Path(openai.__path__[0]) / "page.html").read_text(encoding="utf-8")
