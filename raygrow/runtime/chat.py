"""A conversation in the terminal, with a server or with a model folder loaded here."""

import itertools
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from raygrow.infer.config import EngineConfig
from raygrow.infer.load import load_engine
from raygrow.infer.request import Request
from raygrow.infer.sampling import Sampling
from raygrow.text.chat_template import ChatTemplate
from raygrow.text.tokenizer import load_tokenizer

HELP = """\
Enter sends. Ctrl-C stops an answer, and at the prompt leaves.
/reset  forgets the conversation
/help   says this
/quit   leaves\
"""
SECONDS_TO_ANSWER = 600
"""Longest wait for a server's next word: it may have to start first."""
SHOWN_CONTROLS = "\n\t"
LOST = "the connection was lost before the answer was complete"

Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """What is asked for in every turn. None leaves it to the server, or to the engine."""

    system: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int = 512
    seed: int | None = None


@dataclass(frozen=True)
class Piece:
    """What is new of an answer: text, and how many tokens it is, where that is known."""

    text: str
    tokens: int


class Speaker(Protocol):
    """Answers conversations."""

    name: str

    def answer(self, messages: list[Message], config: ChatConfig) -> Iterator[Piece]:
        """The answer, as it comes. Closing the iterator stops it."""
        ...


class Server:
    """A model behind an OpenAI-compatible server.

    Args:
        url: Of the server, with or without `/v1`.
        model: Which of its models; its first one when not given.
        api_key: If the server asks for one.

    Raises:
        OSError: If nothing answers at the URL.
        ValueError: If the server refuses, or has no such model.
    """

    def __init__(self, url: str, *, model: str | None = None, api_key: str | None = None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._api_key = api_key
        try:
            with self._request("models") as answer:
                names = [str(entry["id"]) for entry in json.load(answer)["data"]]
        except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, HTTPException) as error:
            raise ValueError(f"what answers at {self._url}/models does not speak OpenAI's API") from error
        if not names or model not in (None, *names):
            raise ValueError(f"{url} has no model {model!r}; it has {', '.join(names) or 'none'}")
        self.name = model or names[0]

    def answer(self, messages: list[Message], config: ChatConfig) -> Iterator[Piece]:
        """See Speaker."""
        wanted = {
            "model": self.name,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": config.temperature,
            "top_p": config.top_p,
            "max_tokens": config.max_tokens,
            "seed": config.seed,
        }
        body = {key: value for key, value in wanted.items() if value is not None}
        try:
            with self._request("chat/completions", body) as answer:
                for event in _events(answer):
                    for choice in event["choices"]:
                        yield Piece(choice["delta"].get("content") or "", 0)
                    if usage := event.get("usage"):
                        yield Piece("", usage["completion_tokens"])
        except HTTPException as error:
            raise OSError(LOST) from error

    def _request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._url}/{path}", data=data, headers=headers)
        try:
            return urllib.request.urlopen(request, timeout=SECONDS_TO_ANSWER)
        except urllib.error.HTTPError as error:
            raise ValueError(f"{self._url}: {_reason(error)}") from None
        except urllib.error.URLError as error:
            raise OSError(
                f"no server answers at {self._url} ({error.reason}); start one with `raygrow serve MODEL`"
            ) from None


class Loaded:
    """A model in this process.

    Args:
        folder: Of the model.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.exists():
            raise FileNotFoundError(f"{folder}: there is no such folder; give a server's URL, or a model's folder")
        self.name = str(folder)
        self._engine = load_engine(folder, EngineConfig(max_num_seqs=1))
        self._template = ChatTemplate(load_tokenizer(folder))
        self._turns = itertools.count()

    def answer(self, messages: list[Message], config: ChatConfig) -> Iterator[Piece]:
        """See Speaker."""
        sampling = Sampling(
            max_tokens=config.max_tokens,
            temperature=1.0 if config.temperature is None else config.temperature,
            top_p=1.0 if config.top_p is None else config.top_p,
            seed=config.seed,
            stop=self._template.stops,
        )
        prompt = tuple(self._template.encode(messages))
        request = Request(id=f"turn-{next(self._turns)}", prompt=prompt, sampling=sampling)
        self._engine.add(request)
        try:
            while self._engine.has_work:
                for delta in self._engine.step():
                    if delta.error:
                        raise ValueError(delta.error)
                    yield Piece(delta.text, len(delta.token_ids))
        finally:
            self._engine.abort(request.id)


def _reason(error: urllib.error.HTTPError) -> str:
    """What the server says is wrong."""
    try:
        said = json.load(error)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = f"{error.code} {error.reason}"
    wait = error.headers.get("Retry-After")
    return f"{said} (try again in {wait} s)" if wait else said


def _events(lines: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON of each event of a stream, up to its end.

    Raises:
        ValueError: If the server reports an error.
        OSError: If the stream is cut off.
    """
    for line in lines:
        data = line.decode().removeprefix("data:").strip()
        if data == "[DONE]":
            return
        if line.startswith(b"data:"):
            event = json.loads(data)
            if error := event.get("error"):
                raise ValueError(error["message"])
            yield event
    raise OSError(LOST)


def chat(
    speaker: Speaker,
    config: ChatConfig,
    *,
    console: Console | None = None,
    read: Callable[[str], str] = input,
) -> None:
    """Talks until the user leaves.

    Args:
        speaker: Who answers.
        config: What is asked for in every turn.
        console: Where answers are shown.
        read: Asks the user for a line; raises EOFError or KeyboardInterrupt when there is no more.
    """
    console = console or Console(highlight=False)
    console.print(f"{speaker.name}. /help says what there is.", style="dim", markup=False)
    opening = [{"role": "system", "content": config.system}] if config.system else []
    messages = list(opening)
    while True:
        try:
            said = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if said == "/quit":
            return
        if said == "/reset":
            messages = list(opening)
            console.print("A new conversation.", style="dim")
        elif said.startswith("/"):
            console.print(HELP if said == "/help" else f"{said}: no such command\n{HELP}", style="dim", markup=False)
        elif said:
            messages.append({"role": "user", "content": said})
            answer = _show(speaker.answer(messages, config), console)
            # a turn without an answer would stand there for good
            messages = [*messages, {"role": "assistant", "content": answer}] if answer else messages[:-1]


def _show(pieces: Iterator[Piece], console: Console) -> str:
    """Shows an answer as it comes, and how fast it came; gives its text."""
    answer, tokens, stopped = "", 0, ""
    begun = first = last = time.monotonic()
    try:
        for piece in pieces:
            tokens += piece.tokens
            if piece.text:
                last = time.monotonic()
                first = last if not answer else first
                answer += piece.text
                console.out(_printable(piece.text), end="", highlight=False)
    except KeyboardInterrupt:
        stopped = "stopped"
    except (OSError, ValueError) as error:
        stopped = str(error)
    finally:
        getattr(pieces, "close", lambda: None)()
    told = [f"{tokens} tokens"] if tokens else []
    if tokens > 1 and last > first:
        told.append(f"{(tokens - 1) / (last - first):.1f} tokens/s")
    if answer:
        told.append(f"first after {first - begun:.2f} s")
    console.print()
    console.print(" · ".join([*told, *([stopped] if stopped else [])]), style="dim", markup=False)
    return answer


def _printable(text: str) -> str:
    """Without control characters, which a terminal would obey."""
    return "".join(char for char in text if char.isprintable() or char in SHOWN_CONTROLS)
