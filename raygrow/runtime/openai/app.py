"""The OpenAI-compatible API over models, as a FastAPI app that needs nothing of Ray."""

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Send

from raygrow.infer.request import Delta, Request, merged
from raygrow.infer.sampling import Sampling
from raygrow.runtime.openai import errors
from raygrow.runtime.openai.answering import answer
from raygrow.runtime.openai.errors import ApiError, as_api_error
from raygrow.runtime.openai.http import CLIENT_GONE, ClientGone, EventStream, Gate, while_connected
from raygrow.runtime.openai.metrics import Metrics
from raygrow.runtime.openai.model import Model
from raygrow.runtime.openai.prompts import chat_prompt, check_ids, completion_prompts, encode, encode_chat
from raygrow.runtime.openai.protocol import (
    COMPLETION_TOKENS,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
)
from raygrow.runtime.openai.responses import Answer, ChatShape, CompletionShape, Json, Prompt, Shape, Usage
from raygrow.text.chat_template import SPECIAL_NAMES, ChatTemplate, named_token

logger = logging.getLogger(__name__)

PAGE = "page.html"


@dataclass(frozen=True, kw_only=True)
class ApiConfig:
    """Limits of the API.

    Raises:
        ValueError: If a field is out of range; names the field and its value.
    """

    api_key: str | None = field(default=None, repr=False)
    """Callers have to send it as `Authorization: Bearer KEY`; without one, everybody who reaches the server may ask."""
    max_request_bytes: int = 4 * 2**20
    """Of a body."""
    max_tokens: int | None = None
    """New tokens of an answer at most, whatever is asked for; as many as the model takes when not given."""
    max_choices: int = 256
    """Answers of one call: prompts times `n`."""
    cors_origins: tuple[str, ...] = ()
    """Web pages that browsers let call this server, such as https://example.org; none when not given."""

    def __post_init__(self) -> None:
        for name in ("max_request_bytes", "max_tokens", "max_choices"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("api_key='': must not be empty; leave it out to let everybody ask")


def make_app(models: Mapping[str, Model], config: ApiConfig | None = None) -> FastAPI:
    """The API of some models.

    Args:
        models: By their ids. The first one answers where no model can be named, as at `/tokenizer_info`.
        config: Limits.

    Raises:
        ValueError: If there is no model, or the chat template of one is no valid template.
    """
    if not models:
        raise ValueError("models={}: name at least one")
    config = config or ApiConfig()
    app = FastAPI(title="raygrow", docs_url=None, redoc_url=None)
    metrics = Metrics()
    api = _Api(models, config, metrics)
    _add_routes(app, api)
    errors.install(app)
    app.add_exception_handler(ClientGone, api.client_gone)
    gate = partial(Gate, api_key=config.api_key, max_request_bytes=config.max_request_bytes, metrics=metrics)
    app.add_middleware(gate)  # pyright: ignore[reportArgumentType]
    if config.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["*"], allow_headers=["*"])
    return app


def _add_routes(app: FastAPI, api: "_Api") -> None:
    app.get("/", response_class=HTMLResponse, include_in_schema=False)(api.page)
    app.get("/health")(api.health)
    app.get("/metrics", response_class=Response)(api.show_metrics)
    app.get("/v1/models")(api.list_models)
    app.get("/v1/models/{id:path}")(api.show_model)
    app.post("/v1/completions", response_model=None)(api.complete)
    app.post("/v1/chat/completions", response_model=None)(api.chat)
    app.post("/tokenize")(api.tokenize)
    app.post("/detokenize")(api.detokenize)
    app.get("/tokenizer_info")(api.tokenizer_info)


class _Api:
    """What the routes do. FastAPI reads the types of their arguments."""

    def __init__(self, models: Mapping[str, Model], config: ApiConfig, metrics: Metrics) -> None:
        self._models, self._config, self._metrics = dict(models), config, metrics
        self._templates = {id: ChatTemplate(model.tokenizer) for id, model in models.items()}
        self._page = Path(__file__).with_name(PAGE).read_text(encoding="utf-8")

    async def page(self) -> HTMLResponse:
        """A page to chat."""
        return HTMLResponse(self._page)

    async def health(self) -> dict[str, str]:
        """Whether all models can answer."""
        for model in self._models.values():
            try:
                await model.check()
            except Exception as error:
                logger.warning("%s cannot answer: %s", model.id, error)
                raise ApiError(f"{model.id} cannot answer: {error}", status=503, code="unhealthy") from error
        return {"status": "ok"}

    async def show_metrics(self) -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def list_models(self) -> Json:
        """The models that are served."""
        return {"object": "list", "data": [_describe(model) for model in self._models.values()]}

    async def show_model(self, id: str) -> Json:
        """One model."""
        return _describe(self._model(id))

    async def complete(self, body: CompletionRequest, http: HttpRequest) -> Response:
        """Continues texts."""
        model = self._model(body.model)
        count = len(body.prompts) * body.choices
        self._check_choices(count)
        prompts = await completion_prompts(model, body)
        asked = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        samplings = [
            body.sampling(
                choice,
                max_tokens=self._allowed(asked),
                logprobs=body.logprobs,
                prompt_logprobs=(body.logprobs or 0)
                if body.echo and (body.logprobs is not None or not asked)
                else None,
            )
            for choice in range(body.choices)
        ]
        each = [prompt for prompt in prompts for _ in samplings]
        shape = CompletionShape(model.tokenizer, each, echo=bool(body.echo), logprobs=body.logprobs is not None)
        return await self._answer(model, body, http, shape, prompts, samplings)

    async def chat(self, body: ChatRequest, http: HttpRequest) -> Response:
        """Takes the next turn of a conversation."""
        model = self._model(body.model)
        self._check_choices(body.choices)
        template = self._templates[model.id]
        prompt = await chat_prompt(model, template, body)
        asked = self._allowed(body.limit or model.max_model_len)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        samplings = [
            body.sampling(choice, max_tokens=asked, logprobs=logprobs, stops=template.stops)
            for choice in range(body.choices)
        ]
        shape = ChatShape(model.tokenizer, logprobs=bool(body.logprobs))
        return await self._answer(model, body, http, shape, [prompt], samplings)

    async def tokenize(self, body: TokenizeRequest) -> Json:
        """A text, or a conversation, as tokens."""
        model = self._model(body.model)
        if body.messages is not None:
            begin = body.add_generation_prompt
            ids = await encode_chat(self._templates[model.id], body.messages, add_generation_prompt=begin)
        else:
            ids = await encode(model, body.prompt or "", special_tokens=body.add_special_tokens)
        spelled = [model.tokenizer.token(id) for id in ids] if body.return_token_strs else None
        return {"count": len(ids), "max_model_len": model.max_model_len, "tokens": ids, "token_strs": spelled}

    async def detokenize(self, body: DetokenizeRequest) -> dict[str, str]:
        """Tokens as text."""
        model = self._model(body.model)
        check_ids(model, body.tokens, param="tokens")
        return {"prompt": await asyncio.to_thread(model.tokenizer.decode, body.tokens)}

    async def tokenizer_info(self, model: str | None = None) -> Json:
        """What evaluation tools want to know of a tokenizer: special tokens and the chat template."""
        chosen = self._model(model, first=True)
        tokenizer = chosen.tokenizer
        names = {name: named_token(tokenizer, name) for name in SPECIAL_NAMES}
        source = self._templates[chosen.id].source
        return {"model": chosen.id, "vocab_size": tokenizer.vocab_size, "chat_template": source, **names}

    async def client_gone(self, request: HttpRequest, error: Exception) -> Response:
        """What nobody reads; a log shows it."""
        return Response(status_code=CLIENT_GONE)

    def _model(self, id: str | None, *, first: bool = False) -> Model:
        if id is None and (first or len(self._models) == 1):
            return next(iter(self._models.values()))
        if id is None:
            raise ApiError(f"model: is missing; name one of {', '.join(self._models)}", param="model")
        if id not in self._models:
            known = ", ".join(self._models)
            message = f"model: there is no {id[:200]!r}; this server has {known}"
            raise ApiError(message, status=404, param="model", code="model_not_found")
        return self._models[id]

    def _allowed(self, max_tokens: int) -> int:
        return min(max_tokens, self._config.max_tokens or max_tokens)

    def _check_choices(self, count: int) -> None:
        if count > self._config.max_choices:
            most = self._config.max_choices
            raise ApiError(f"n: prompts times n are {count} answers; this server gives at most {most}", param="n")

    async def _answer(
        self,
        model: Model,
        body: GenerationRequest,
        http: HttpRequest,
        shape: Shape,
        prompts: Sequence[Prompt],
        samplings: Sequence[Sampling],
    ) -> Response:
        """The answers to all prompts: whole, or as a stream once the first of them has begun."""
        check_ids(model, body.stop_token_ids or (), param="stop_token_ids")
        name = uuid.uuid4().hex  # not the caller's: that need not be the only one of its name
        each = [(prompt, sampling) for prompt in prompts for sampling in samplings]
        requests = [
            Request(id=f"{name}-{index}", prompt=prompt.ids, sampling=sampling)
            for index, (prompt, sampling) in enumerate(each)
        ]
        usage = Usage(sum(len(prompt.ids) for prompt in prompts))
        written = Answer(shape, model=model.id, name=name)
        deltas = answer(model, requests, self._metrics, param=shape.param)
        if not body.stream:
            return JSONResponse(await while_connected(http, partial(_whole, deltas, written, usage)))
        # what cannot even begin is told by a status, which a stream can no longer change
        begin = await while_connected(http, partial(anext, deltas))
        return EventStream(http, partial(_stream, begin, deltas, written, usage, body.include_usage))


async def _whole(deltas: AsyncGenerator[dict[int, Delta]], written: Answer, usage: Usage) -> Json:
    """A whole answer, when all of it is there."""
    pieces: dict[int, list[Delta]] = {}
    async with aclosing(deltas):
        async for new in deltas:
            usage.add(new)
            for index, delta in new.items():
                pieces.setdefault(index, []).append(delta)
    return written.whole({index: merged(parts) for index, parts in pieces.items()}, usage.body)


async def _stream(
    begin: dict[int, Delta],
    rest: AsyncGenerator[dict[int, Delta]],
    written: Answer,
    usage: Usage,
    include_usage: bool,
    send: Send,
) -> None:
    """Sends an answer in chunks as it comes; an error in the middle of it is an event of its own."""
    more: Json = {"usage": None} if include_usage else {}

    async def send_on(*chunks: Json) -> None:
        events = "".join(
            f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n" for chunk in chunks
        )
        if events:
            await send({"type": "http.response.body", "body": events.encode(), "more_body": True})

    async with aclosing(rest):
        try:
            usage.add(begin)
            await send_on(*({**chunk, **more} for chunk in written.chunks(begin)))
            async for deltas in rest:
                usage.add(deltas)
                await send_on(*({**chunk, **more} for chunk in written.chunks(deltas)))
            if include_usage:
                await send_on(written.usage_chunk(usage.body))
        except OSError:
            raise  # the client has gone
        except Exception as error:
            await send_on(as_api_error(error).body)
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})


def _describe(model: Model) -> Json:
    return {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": "raygrow",
        "max_model_len": model.max_model_len,
        "sparsity": model.sparsity,
    }
