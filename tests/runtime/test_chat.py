"""The terminal chat: with a server, and with a model loaded here."""

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from raygrow.data.corpus import FilesCorpus
from raygrow.runtime.chat import ChatConfig, Loaded, Message, Piece, Server, chat
from tests.runtime.serving import random_model


class Echo:
    """Answers with what it was asked; notes what came before."""

    name = "echo"

    def __init__(self) -> None:
        self.heard: list[list[Message]] = []
        self.closed = 0

    def answer(self, messages: list[Message], config: ChatConfig) -> Iterator[Piece]:
        self.heard.append(list(messages))
        try:
            for word in messages[-1]["content"].split(" "):
                if word == "<ctrl-c>":
                    raise KeyboardInterrupt
                if word == "<error>":
                    raise OSError("the connection was lost")
                yield Piece(f"{word} ", 1)
        finally:
            self.closed += 1


def talk(speaker: Any, *lines: str, config: ChatConfig | None = None) -> str:
    """What is shown of a conversation in which the user types these lines."""
    typed = iter(lines)

    def read(_: str) -> str:
        for line in typed:
            return line
        raise EOFError

    shown = io.StringIO()
    chat(speaker, config or ChatConfig(), console=Console(file=shown, width=200), read=read)
    return shown.getvalue()


def test_a_conversation_is_remembered_until_reset() -> None:
    echo = Echo()
    shown = talk(echo, "one two", "", "three", "/reset", "four", "/quit", "five", config=ChatConfig(system="Be brief."))
    system = {"role": "system", "content": "Be brief."}
    first = [system, {"role": "user", "content": "one two"}]
    assert echo.heard == [
        first,
        [*first, {"role": "assistant", "content": "one two "}, {"role": "user", "content": "three"}],
        [system, {"role": "user", "content": "four"}],
    ]
    assert "one two \n" in shown
    assert "2 tokens · " in shown
    assert "tokens/s" in shown


def test_help_and_unknown_commands() -> None:
    shown = talk(Echo(), "/help", "/halp")
    assert shown.count("/reset  forgets") == 2
    assert "/halp: no such command" in shown


def test_ctrl_c_stops_an_answer_and_not_the_conversation() -> None:
    echo = Echo()
    shown = talk(echo, "begin <ctrl-c> never", "go on")
    assert "begin \n" in shown
    assert "stopped" in shown
    assert "never" not in shown
    assert echo.closed == 2
    assert [message["content"] for message in echo.heard[1]] == ["begin <ctrl-c> never", "begin ", "go on"]


def test_a_turn_without_an_answer_is_forgotten() -> None:
    echo = Echo()
    assert "the connection was lost" in talk(echo, "<error>", "go on")
    assert [message["content"] for message in echo.heard[1]] == ["go on"]


def test_what_a_model_writes_cannot_command_the_terminal() -> None:
    assert "\x1b" not in talk(Echo(), "a\x1b[2Jb \x9b31m")


def test_a_model_loaded_here(corpus: FilesCorpus, tmp_path: Path) -> None:
    folder = random_model(tmp_path / "model", Path(corpus.path) / "tokenizer")
    speaker, config = Loaded(folder), ChatConfig(max_tokens=20, seed=1)
    conversation = [{"role": "user", "content": "What is growth?"}]
    first = list(speaker.answer(conversation, config))
    assert "".join(piece.text for piece in first)
    assert 0 < sum(piece.tokens for piece in first) <= 20
    stopped = speaker.answer(conversation, config)
    next(stopped)
    stopped.close()
    assert list(speaker.answer(conversation, config)) == first


CUT_OFF = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n40\r\ndata: {"


class Scripted(BaseHTTPRequestHandler):
    """A server that answers everybody in the same way; what it was sent is in `seen`."""

    lines: tuple[str, ...] = ()
    status = 200
    seen: list[dict[str, Any]]

    def do_GET(self) -> None:
        self._send(json.dumps({"data": [{"id": "first"}, {"id": "second"}]}))

    def do_POST(self) -> None:
        self.seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self._send("".join(f"{line}\n\n" for line in self.lines))

    def _send(self, body: str) -> None:
        self.send_response(self.status)
        self.send_header("Retry-After", "3")
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def scripted() -> Iterator[tuple[type[Scripted], str]]:
    class Handler(Scripted):
        seen: list[dict[str, Any]] = []  # noqa: RUF012 (one server, one list)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield Handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def chunk(text: str) -> str:
    return "data: " + json.dumps({"choices": [{"delta": {"content": text}}]})


def test_a_server(scripted: tuple[type[Scripted], str]) -> None:
    handler, url = scripted
    usage = json.dumps({"choices": [], "usage": {"completion_tokens": 7}})
    handler.lines = (chunk("Hel"), ": a comment", chunk("lo"), f"data: {usage}", "data: [DONE]")
    shown = talk(Server(url + "/v1/", model="second"), "hi", config=ChatConfig(temperature=0))
    assert shown.startswith("second. ")
    assert "Hello\n7 tokens" in shown
    (body,) = handler.seen
    assert body["messages"] == [{"role": "user", "content": "hi"}]
    assert (body["model"], body["temperature"], body["stream"]) == ("second", 0, True)
    assert "seed" not in body


@pytest.mark.parametrize(
    ("lines", "status", "told"),
    [
        ((chunk("Hel"),), 200, "the connection was lost before the answer was complete"),
        (('data: {"error": {"message": "the replica was lost"}}',), 200, "the replica was lost"),
        (('{"error": {"message": "too many requests"}}',), 429, "too many requests (try again in 3 s)"),
        (("no JSON",), 502, "502"),
    ],
)
def test_a_server_in_trouble(scripted: tuple[type[Scripted], str], lines: Any, status: int, told: str) -> None:
    handler, url = scripted
    server = Server(url)
    handler.lines, handler.status = lines, status
    assert told in talk(server, "hi")


@pytest.mark.parametrize("sent", [CUT_OFF, b"what?\r\n\r\n"])
def test_an_answer_that_is_cut_off_or_none(
    scripted: tuple[type[Scripted], str], monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    handler, url = scripted
    server = Server(url)
    monkeypatch.setattr(handler, "do_POST", lambda self: self.wfile.write(sent))
    assert "the connection was lost before the answer was complete" in talk(server, "hi")


@pytest.mark.parametrize("page", ["<html>", "[]", '{"data": 3}', "{}"])
def test_what_is_no_such_server_is_told(
    scripted: tuple[type[Scripted], str], monkeypatch: pytest.MonkeyPatch, page: str
) -> None:
    handler, url = scripted
    monkeypatch.setattr(handler, "do_GET", lambda self: self._send(page))
    with pytest.raises(ValueError, match="does not speak OpenAI's API"):
        Server(url)


def test_a_server_that_is_not_there_and_a_model_that_it_has_not(scripted: tuple[type[Scripted], str]) -> None:
    _, url = scripted
    with pytest.raises(ValueError, match="no model 'third'; it has first, second"):
        Server(url, model="third")
    with pytest.raises(OSError, match="start one with `raygrow serve MODEL`"):
        Server("http://127.0.0.1:9")
