"""What clients may ask for: OpenAI's fields, and those of vLLM for what an engine can do besides.

Unknown fields are tolerated, since clients send many. Fields that would change the answer and cannot be honoured are
refused by name, since an answer that silently ignores them would be wrong.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    StringConstraints,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from raygrow.infer.sampling import MAX_LOGPROBS, MAX_SEED, Sampling

MOST_STOPS = 64
MOST_CHOICES = 128
CHAT_LOGPROBS = 20
COMPLETION_TOKENS = 16
"""New tokens at most of a completion that does not say, as at OpenAI."""

StopText = Annotated[str, StringConstraints(min_length=1)]
Count = Annotated[int, Field(ge=1, le=2**31)]


class Only:
    """Marks a field that is understood and not offered: it may be null, or have a value that asks for nothing."""

    def __init__(self, *harmless: Any) -> None:
        self._harmless = harmless

    def check(self, value: Any) -> Any:
        """The value, if it is harmless."""
        if value is None or value in self._harmless:
            return value
        allowed = " or ".join(["leave it out", *(f"give {json.dumps(harmless)}" for harmless in self._harmless)])
        raise PydanticCustomError("unsupported_parameter", "is not supported; {a}", {"a": allowed})

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"enum": [None, *self._harmless]}


class StreamOptions(BaseModel):
    """What a stream has besides text."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None
    """One more chunk at the end, without choices, that counts tokens."""


class GenerationRequest(BaseModel):
    """What completions and chats have in common."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    model: str | None = None
    """May be left out where one model is served."""
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    seed: Annotated[int, Field(ge=-MAX_SEED, le=MAX_SEED)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(max_length=MOST_STOPS)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    presence_penalty: Annotated[Any, Only(0)] = None
    frequency_penalty: Annotated[Any, Only(0)] = None
    repetition_penalty: Annotated[Any, Only(1)] = None
    min_p: Annotated[Any, Only(0)] = None
    min_tokens: Annotated[Any, Only(0)] = None
    logit_bias: Annotated[Any, Only({})] = None
    response_format: Annotated[Any, Only({"type": "text"})] = None
    use_beam_search: Annotated[Any, Only(False)] = None
    structured_outputs: Annotated[Any, Only()] = None
    guided_json: Annotated[Any, Only()] = None
    guided_regex: Annotated[Any, Only()] = None
    guided_choice: Annotated[Any, Only()] = None
    guided_grammar: Annotated[Any, Only()] = None
    bad_words: Annotated[Any, Only([])] = None
    allowed_token_ids: Annotated[Any, Only()] = None
    truncate_prompt_tokens: Annotated[Any, Only()] = None
    include_stop_str_in_output: Annotated[Any, Only(False)] = None
    skip_special_tokens: Annotated[Any, Only(True)] = None

    @model_validator(mode="after")
    def _fits_together(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise _wrong("stream_options", "needs stream=true")
        return self

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a count of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(
        self,
        choice: int,
        *,
        max_tokens: int,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        stops: Sequence[str] = (),
    ) -> Sampling:
        """How tokens of the n-th answer are chosen: with a seed, every answer has its own, and the first the given."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        seed = None if self.seed is None else (self.seed + choice + MAX_SEED) % (2 * MAX_SEED + 1) - MAX_SEED
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            seed=seed,
            stop=(*stop, *stops),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


TokenId = Annotated[int, Field(ge=0, le=2**31)]
Ids = Annotated[list[TokenId], Field(min_length=1)]


class CompletionRequest(GenerationRequest):
    """A text, or several, to continue."""

    prompt: str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)] = ""
    """Text or token ids, one prompt or several. An empty text begins a document."""
    max_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None
    """16 when not given; 0 only with `echo`."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    """The answer begins with the prompt; with `logprobs`, its tokens are scored too."""
    add_special_tokens: bool | None = None
    """Put around a text what the tokenizer puts around texts, such as a token that begins it; true when not given."""

    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    suffix: Annotated[Any, Only("")] = None
    prompt_embeds: Annotated[Any, Only()] = None

    @model_validator(mode="after")
    def _completes(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != self.choices:
            raise _wrong("best_of", f"is only supported when it is n={self.choices}: all answers are given")
        if self.max_tokens == 0 and not self.echo:
            raise _wrong("max_tokens", "must be at least 1; 0 needs echo=true")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or more texts, or one or more lists of token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt  # pyright: ignore[reportReturnType]


class ContentPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(strict=True)

    type: Literal["text", "input_text", "output_text", "refusal"]
    text: str | None = None
    refusal: str | None = None
    """The text of a part of this type."""

    @model_validator(mode="after")
    def _has_a_text(self) -> "ContentPart":
        field = "refusal" if self.type == "refusal" else "text"
        if getattr(self, field) is None:
            raise _wrong(field, f"is missing; a part of type {self.type} has its text there")
        return self

    @property
    def said(self) -> str:
        """Its text."""
        return (self.refusal if self.type == "refusal" else self.text) or ""


class Message(BaseModel):
    """One turn of a conversation. What else it has is for the model's chat template."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    content: str | list[ContentPart] | None = None

    @property
    def for_template(self) -> dict[str, Any]:
        """As chat templates take it: one text."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.said for part in parts or ())
        role = "system" if self.role == "developer" else self.role
        # clients send answers back with fields that hold nothing, and templates ask whether a message has them
        more = {name: value for name, value in (self.model_extra or {}).items() if value is not None}
        return {**more, "role": role, "content": text}


Messages = Annotated[list[Message], Field(min_length=1)]


class ChatRequest(GenerationRequest):
    """A conversation whose next turn is the model's."""

    messages: Messages
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    """The newer name of `max_tokens`. As much as the model takes, when neither is given."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=CHAT_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the model's chat template."""

    tools: Annotated[Any, Only([])] = None
    functions: Annotated[Any, Only([])] = None
    tool_choice: Annotated[Any, Only("none", "auto")] = None
    function_call: Annotated[Any, Only("none", "auto")] = None
    modalities: Annotated[Any, Only(["text"])] = None
    audio: Annotated[Any, Only()] = None
    chat_template: Annotated[Any, Only()] = None
    continue_final_message: Annotated[Any, Only(False)] = None

    @model_validator(mode="after")
    def _chats(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise _wrong("top_logprobs", "needs logprobs=true")
        return self

    @property
    def limit(self) -> int | None:
        """New tokens at most, if the client says."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TokenizeRequest(BaseModel):
    """A text, or a conversation, to be shown as tokens."""

    model_config = ConfigDict(strict=True)

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise _wrong("prompt", "give either prompt or messages")
        return self


class DetokenizeRequest(BaseModel):
    """Tokens to be shown as text."""

    model_config = ConfigDict(strict=True)

    model: str | None = None
    tokens: list[TokenId]


def _wrong(field: str, reason: str) -> PydanticCustomError:
    """A problem of one field that shows only beside another; `field` becomes the error's place."""
    return PydanticCustomError("invalid_value", "{reason}", {"field": field, "reason": reason})
