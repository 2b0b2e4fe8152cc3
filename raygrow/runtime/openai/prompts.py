"""What clients write, as tokens."""

import asyncio
from collections.abc import Sequence
from typing import Any

from raygrow.runtime.openai.errors import ApiError
from raygrow.runtime.openai.model import Model
from raygrow.runtime.openai.protocol import ChatRequest, CompletionRequest, Message
from raygrow.runtime.openai.responses import Prompt
from raygrow.text.chat_template import ChatTemplate


async def completion_prompts(model: Model, body: CompletionRequest) -> list[Prompt]:
    """The prompts of a completion.

    Raises:
        ApiError: If one is longer than the model takes, or holds what is no token of it.
    """
    return [await _completion_prompt(model, prompt, body) for prompt in body.prompts]


async def _completion_prompt(model: Model, prompt: str | Sequence[int], body: CompletionRequest) -> Prompt:
    room = 0 if body.max_tokens == 0 else 1
    if isinstance(prompt, str):
        ids = await encode(model, prompt, special_tokens=body.add_special_tokens is not False)
        return Prompt(_fitting(model, ids or [model.tokenizer.eos_id], room=room, param="prompt"), prompt)
    check_ids(model, prompt, param="prompt")
    ids = _fitting(model, prompt, room=room, param="prompt")
    return Prompt(ids, model.tokenizer.decode(list(ids)) if body.echo else "")


async def chat_prompt(model: Model, template: ChatTemplate, body: ChatRequest) -> Prompt:
    """The prompt of a conversation.

    Raises:
        ApiError: If it is longer than the model takes, or its template refuses it.
    """
    begin = body.add_generation_prompt is not False
    ids = await encode_chat(template, body.messages, add_generation_prompt=begin, variables=body.chat_template_kwargs)
    return Prompt(_fitting(model, ids, room=1, param="messages"), "")


async def encode(model: Model, text: str, *, special_tokens: bool) -> list[int]:
    """A text as tokens, as `transformers` makes them: a special token that it spells out is that token."""
    _check_text(text, param="prompt")
    # in a thread: a long text takes long, and others are waiting
    return await asyncio.to_thread(model.tokenizer.encode, text, special_tokens=special_tokens, parse_special=True)


async def encode_chat(
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    variables: dict[str, Any] | None = None,
) -> list[int]:
    """A conversation as tokens."""
    given = [message.for_template for message in messages]
    try:
        ids = await asyncio.to_thread(
            template.encode, given, add_generation_prompt=add_generation_prompt, variables=variables
        )
    except (TypeError, UnicodeEncodeError) as error:
        raise ApiError("messages: hold half a character (a lone surrogate)", param="messages") from error
    except RecursionError as error:
        raise ApiError("messages: what they hold is nested too deeply", param="messages") from error
    except ValueError as error:
        raise ApiError(f"messages: {error}", param="messages") from error
    if not ids:
        raise ApiError("messages: the model's chat template makes an empty prompt of them", param="messages")
    return ids


def check_ids(model: Model, ids: Sequence[int], *, param: str) -> None:
    """Raises ApiError for what is no token of a model."""
    highest = model.tokenizer.vocab_size - 1
    wrong = next((id for id in ids if not 0 <= id <= highest), None)
    if wrong is not None:
        raise ApiError(f"{param}: token {wrong}: this model has the tokens 0 to {highest}", param=param)


def _fitting(model: Model, ids: Sequence[int], *, room: int, param: str) -> tuple[int, ...]:
    """The tokens, if the model can take as many and `room` more."""
    longest = model.max_model_len - room
    if len(ids) > longest:
        raise ApiError(
            f"{param}: has {len(ids)} tokens, and this model takes at most {longest}; shorten it",
            param=param,
            code="context_length_exceeded",
        )
    return tuple(ids)


def _check_text(text: str, *, param: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ApiError(f"{param}: holds half a character (a lone surrogate)", param=param) from error
