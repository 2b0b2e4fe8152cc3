"""Malformed bodies, made from the server's own schema: refused, never a mistake of the server, which lives on."""

import json
import random
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from raygrow.runtime.openai.app import ApiConfig, make_app
from tests.runtime.openai.local import LocalModel, served

ROUTES = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1.5, 10**400, 2**31, -(2**63), float("nan"), float("inf"), "", "a", "\ud800", "\x00"),
    *("\ue0000\ue001", "{{ 7 * 7 }}", "<|endoftext|>", "x" * 5000, [], {}, [[]], [None], [{}], {"": None}, [10**30]),
    *({"type": "text"}, [{"role": "user"}], [["a"]], [[1, "a"]], {"messages": 1, "self": 2}, [[[[[[]]]]]]),
)


class Fuzzer:
    """Values that fit a schema, and values that nearly do."""

    def __init__(self, schema: dict[str, Any], seed: int) -> None:
        self._schemas, self._draw = schema["components"]["schemas"], random.Random(seed)

    def body(self, name: str) -> str:
        """A body with something wrong in it, or several things."""
        value = self._value({"$ref": f"#/components/schemas/{name}"})
        for _ in range(self._draw.randint(1, 3)):
            value = self._spoiled(value)
        text = json.dumps(value)
        if self._draw.random() < 0.1:
            cut = self._draw.randrange(len(text) + 1)
            text = text[:cut] + self._draw.choice(["", "}", '"', "\\u12", "\x00", "[" * 2000]) + text[cut + 1 :]
        return text

    def _value(self, schema: dict[str, Any]) -> Any:
        draw = self._draw
        if "$ref" in schema:
            return self._value(self._schemas[schema["$ref"].rsplit("/", 1)[1]])
        for choice in ("anyOf", "enum"):
            if choice in schema:
                chosen = draw.choice(schema[choice])
                return self._value(chosen) if choice == "anyOf" else chosen
        kind = schema.get("type")
        if kind == "object":
            properties, required = schema.get("properties", {}), schema.get("required", ())
            chosen = [name for name in properties if name in required or draw.random() < 0.3]
            return {name: self._value(properties[name]) for name in chosen}
        if kind == "array":
            return [self._value(schema.get("items", {})) for _ in range(draw.randint(schema.get("minItems", 0), 2))]
        if kind == "integer":
            lowest = int(schema.get("minimum", 0))
            return draw.randint(lowest, min(int(schema.get("maximum", lowest + 9)), lowest + 9))
        plain = {"string": "grow", "number": draw.random(), "boolean": draw.random() < 0.5, "null": None}
        return plain[kind] if kind else draw.choice(ODD)

    def _spoiled(self, value: Any) -> Any:
        """The value with something odd at a random place in it."""
        draw = self._draw
        if isinstance(value, dict) and value and draw.random() < 0.9:
            name = draw.choice(list(value))
            if draw.random() < 0.1:
                return {
                    **{key: part for key, part in value.items() if key != name},
                    draw.choice(["", "\ud800", name * 2]): 1,
                }
            return {**value, name: self._spoiled(value[name])}
        if isinstance(value, list) and value and draw.random() < 0.5:
            at = draw.randrange(len(value))
            return [*value[:at], self._spoiled(value[at]), *value[at + 1 :]]
        return draw.choice(ODD)


@pytest.fixture
def url(model: LocalModel) -> Iterator[str]:
    """Of a server whose answers are short: of some bodies, what is left after the fuzzing is quite valid."""
    with served(make_app({model.id: model}, ApiConfig(max_tokens=4))) as address:
        yield address


def test_a_thousand_malformed_bodies_are_never_the_servers_fault(url: str, model: LocalModel) -> None:
    schema = httpx2.get(f"{url}/openapi.json").json()
    fuzzer, statuses = Fuzzer(schema, seed=0), {}
    with httpx2.Client(base_url=url, headers={"content-type": "application/json"}, timeout=60) as client:
        while statuses.get(400, 0) < 1000:
            for route in ROUTES:
                of_body = schema["paths"][route]["post"]["requestBody"]["content"]["application/json"]["schema"]
                body = fuzzer.body(of_body["$ref"].rsplit("/", 1)[1])
                response = client.post(route, content=body.encode(errors="surrogatepass"))
                statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
                assert response.status_code < 500, (route, body, response.text)
                if response.status_code >= 400:
                    error = response.json()["error"]
                    assert isinstance(error["message"], str)
        assert set(statuses) <= {200, 400, 404}
        assert client.get("/health").status_code == 200
        answer = client.post("/v1/completions", json={"prompt": "def", "max_tokens": 2}).json()
        assert answer["usage"]["completion_tokens"] >= 1
        figures = client.get("/metrics").text
    assert 'raygrow_requests_open{model="tiny/model"} 0.0' in figures
    assert model.stats.running == model.stats.waiting == 0
