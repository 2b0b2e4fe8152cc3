"""Conversations as tokens: by the chat template of a tokenizer's folder, or by a plain default.

Templates are Jinja programs that come with a model, so they run in a sandbox. What people write is never taken for a
special token, whatever it spells: nobody can end their own message and begin one of the system's.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from raygrow.text.tokenizer import SETTINGS_FILE, Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
PLAIN = """\
{%- for message in messages -%}
{%- if message.role == 'user' %}User: {% elif message.role == 'assistant' %}Assistant: {% endif -%}
{{ message.content | trim }}
{{ '\n' if message.role not in ('user', 'assistant') -}}
{%- endfor -%}
{%- if add_generation_prompt %}Assistant:{% endif -%}
"""
"""For models that come without a template: turns of a dialogue, as base models know them from text."""
PLAIN_STOPS = ("\nUser:",)
SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


class ChatTemplate:
    """Makes prompts of conversations.

    Args:
        tokenizer: Holds the template, and encodes.

    Raises:
        ValueError: If the template is no valid Jinja, or no text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.source = find_template(tokenizer)
        """The folder's template; None where the plain default serves."""
        self.stops = PLAIN_STOPS if self.source is None else ()
        """Texts that end an answer, besides the end of text."""
        try:
            self._template = _environment().from_string(self.source or PLAIN)
        except jinja2.TemplateError as error:
            raise ValueError(f"the tokenizer's chat template is no valid Jinja ({error})") from error
        names = {name: named_token(tokenizer, name) for name in SPECIAL_NAMES}
        self._names = {name: token for name, token in names.items() if token is not None}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: Each with `role` and `content`.
            add_generation_prompt: Begin the assistant's next turn.
            variables: What else the template knows, such as `enable_thinking`.

        Raises:
            ValueError: If the template cannot make a prompt of these messages.
        """
        # templates ask whether there are any, and `transformers` always says
        given = {"tools": None, "documents": None, **(variables or {}), **self._names, "messages": messages}
        given["add_generation_prompt"] = add_generation_prompt
        try:
            return self._template.render(given)
        except Exception as error:  # a template is a program, and fails in its own ways
            raise ValueError(f"the model's chat template refuses these messages: {error}") from error

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The tokens of a conversation. Raises ValueError as `render` does."""
        special = self._tokenizer.special_tokens
        hidden = {token: f"\ue000{index}\ue001" for index, token in enumerate(special)}
        given = {"messages": [dict(message) for message in messages], "variables": dict(variables or {})}
        written = _replace(given, hidden)
        text = self.render(**written, add_generation_prompt=add_generation_prompt)
        if self.source is None:
            # the plain default has no special tokens of its own, so all that it could hold was written by people
            return self._tokenizer.encode(_replace(text, _inverse(hidden)), special_tokens=True)
        if written == given:
            return self._tokenizer.encode(text, parse_special=True)
        ids: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, special))})", text):
            shown = _replace(part, _inverse(hidden))
            ids += [special[part]] if part in special else self._tokenizer.encode(shown)
        return ids


class Generation(Extension):
    """`{% generation %}` marks what an assistant writes, for training; in a prompt it is as if it were not there."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own way)

    def parse(self, parser: Parser) -> list[Node]:
        """See Jinja."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def find_template(tokenizer: Tokenizer) -> str | None:
    """The chat template among a tokenizer's files."""
    file = tokenizer.file(TEMPLATE_FILE)
    if file:
        return file
    found = tokenizer.settings.get("chat_template")
    if isinstance(found, list):  # several by name: for tools, for retrieval
        named = [each for each in found if isinstance(each, dict)]
        found = next((each.get("template") for each in named if each.get("name") == "default"), None)
    if found and not isinstance(found, str):
        raise ValueError(f"{SETTINGS_FILE}: chat_template holds a {type(found).__name__}, not a template")
    return found or None


def named_token(tokenizer: Tokenizer, name: str) -> str | None:
    """The token that the settings call `bos_token`, `eos_token` and so on."""
    token = tokenizer.settings.get(name)
    if isinstance(token, dict):  # older folders describe the token in full
        token = token.get("content")
    if token is None and name == "eos_token":
        return tokenizer.token(tokenizer.eos_id)
    return token


def _environment() -> ImmutableSandboxedEnvironment:
    """What `transformers` gives a template, so that templates written for it work."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)  # not Jinja's own: that is for HTML


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _inverse(replacements: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in replacements.items()}


def _replace(value: Any, replacements: Mapping[str, str]) -> Any:
    """The value with all texts in it rewritten."""
    if isinstance(value, str):
        for old, new in replacements.items():
            value = value.replace(old, new)
        return value
    if isinstance(value, Mapping):
        return {_replace(key, replacements): _replace(part, replacements) for key, part in value.items()}
    return [_replace(part, replacements) for part in value] if isinstance(value, list) else value
