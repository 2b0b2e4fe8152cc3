"""The page to chat, in a real browser: a prompt is typed, text streams in, a button stops it, a phone can show it."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import uvicorn

from raygrow.data.corpus import FilesCorpus
from raygrow.infer.request import Delta, Request
from raygrow.runtime.openai.app import ApiConfig, make_app
from raygrow.runtime.openai.model import Overloaded
from raygrow.text.tokenizer import load_tokenizer
from tests.browser import CHROMIUM, Page, browser
from tests.runtime.serving import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium to show the page"),
]
PHONE = (390, 844)
KEY = "a key"
CODE = "<b>bold</b> <script>document.title = 'taken over'</script>"


class Writer:
    """A model that writes numbers, at its leisure; the prompt says how it goes on."""

    max_model_len, sparsity = 4096, None
    created = 0

    def __init__(self, id: str, folder: Path) -> None:
        self.id, self.tokenizer = id, load_tokenizer(folder)
        self.requests: list[Request] = []
        self.left = 0
        """Requests that were given up."""

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        self.requests.append(request)
        prompt = self.tokenizer.decode(list(request.prompt))
        if "overload" in prompt:
            raise Overloaded(retry_after=3)
        words = ["Here is code:\n", "```python\n", CODE, "\n```", " and more"] if "code" in prompt else ["0"]
        try:
            for word in words:
                yield Delta(id=request.id, token_ids=(1,), text=word)
            for number in range(1, 40 if "short" in prompt else 4000):
                await asyncio.sleep(0.01)
                yield Delta(id=request.id, token_ids=(1,), text=f" {number}")
                if "break" in prompt and number == 6:
                    yield Delta(id=request.id, finish_reason="error", error="the replica was lost")
                    return
        except (asyncio.CancelledError, GeneratorExit):
            self.left += 1
            raise
        yield Delta(id=request.id, finish_reason="stop")

    async def check(self) -> None:
        pass


@pytest.fixture(scope="module")
def writers(corpus: FilesCorpus) -> list[Writer]:
    return [Writer(name, Path(corpus.path) / "tokenizer") for name in ("first", "second")]


@pytest.fixture(scope="module")
def url(writers: list[Writer]) -> Iterator[str]:
    port = free_port()
    app = make_app({writer.id: writer for writer in writers}, ApiConfig(api_key=KEY))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join()


@pytest.fixture
def page(url: str, tmp_path: Path) -> Iterator[Page]:
    with browser(tmp_path) as page:
        page.resize(*PHONE)
        page.open(url)
        page.until("document.querySelector('#hint').innerText.includes('API key')")
        page.click("#open-settings")
        page.click("#api_key")
        page.type(KEY)
        page.press_enter()
        page.until("document.querySelector('#model').value === 'first'")
        page.click("#settings .close")
        page.problems.clear()  # the 401 before there was a key
        yield page


def say(page: Page, text: str) -> None:
    page.click("#prompt")
    page.type(text)
    page.click("#send")


DONE = "document.querySelector('#stop').hidden"
WRITING = "document.querySelectorAll('article.writing .text').length && [...document.querySelectorAll('.text')].at(-1)"


def test_text_streams_in_and_stops(page: Page, writers: list[Writer]) -> None:
    left = writers[0].left
    say(page, "count")
    first = page.until(f"({WRITING})?.innerText")
    page.until(f"({WRITING})?.innerText.length > {len(first)} + 10")
    assert page.value("document.querySelector('#send').hidden")
    page.click("#stop")
    page.until(DONE)
    assert page.text("article .text").startswith("0 1 2 3")
    assert "stopped" in page.text(".speed")
    deadline = time.monotonic() + 1
    while writers[0].left == left:  # the server was told, and the slot is free
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not page.problems


def test_a_whole_answer_its_speed_and_the_next_turn(page: Page, writers: list[Writer], tmp_path: Path) -> None:
    say(page, "a short one")
    page.until(DONE)
    page.until("document.querySelector('.speed')?.innerText")
    assert page.text("article .text").endswith(" 38 39")
    tokens, speed, first = page.text(".speed").split(" · ")
    assert tokens == "40 tokens"
    assert 20 < float(speed.removesuffix(" tokens/s")) < 110  # one each hundredth of a second, and not faster
    assert first.startswith("first after ")
    say(page, "another short one")
    page.until(f"document.querySelectorAll('article').length === 4 && {DONE}")
    told = writers[0].tokenizer.decode(list(writers[0].requests[-1].prompt))
    assert [told.find(part) >= 0 for part in ("a short one", "38 39", "another short one")] == [True] * 3
    page.photograph(tmp_path / "phone.png")
    assert page.value("document.documentElement.scrollWidth") <= PHONE[0], "it can be read without scrolling sideways"
    # it is there again after a reload, under the earlier conversations
    page.value("location.reload()")
    page.until("document.querySelector('#model')?.value === 'first' && !document.querySelector('article')")
    page.click("#open-history")
    page.until("!!document.querySelector('#past .open')")
    page.click("#past .open")
    assert page.value("document.querySelectorAll('article').length") == 4
    assert not page.problems


def test_sampling_model_and_mode_are_sent(page: Page, writers: list[Writer]) -> None:
    page.value(
        "(() => { for (const [id, value] of [['temperature', 0.5], ['top_p', 0.9], ['top_k', 7], ['max_tokens', 33],"
        " ['seed', 5], ['stop_at', 'END\\nTHE END']]) { const input = document.getElementById(id); input.value = value;"
        " input.dispatchEvent(new Event('input', {bubbles: true})); } })()"
    )
    page.value("document.querySelector('[name=mode][value=continue]').click()")
    page.value(
        "(() => { const select = document.querySelector('#model'); select.value = 'second';"
        " select.dispatchEvent(new Event('change')); })()"
    )
    say(page, "a short text ")
    page.until(f"document.querySelector('.speed')?.innerText && {DONE}")
    request = writers[1].requests[-1]
    assert writers[1].tokenizer.decode(list(request.prompt)) == "a short text "
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0.5, 0.9, 7, 33)
    assert (sampling.seed, sampling.stop) == (5, ("END", "THE END"))
    assert page.text("article .prompt") == "a short text "
    assert not page.problems


def test_what_a_model_writes_is_only_text(page: Page) -> None:
    say(page, "short code")
    page.until(f"document.querySelector('.speed')?.innerText && {DONE}")
    assert page.text("article pre") == CODE
    assert page.value("document.title") == "raygrow"
    assert not page.problems


@pytest.mark.parametrize(
    ("prompt", "told"),
    [("overload", "too many requests; try again in 3 s"), ("break", "the replica was lost")],
)
def test_errors_are_told(page: Page, prompt: str, told: str) -> None:
    say(page, prompt)
    page.until(f"document.querySelector('.error')?.innerText && {DONE}")
    assert told in page.text(".error")
    assert ("0 1 2 3 4 5" in page.text("article .text")) == (prompt == "break")


def test_a_turn_without_an_answer_is_not_said_again(page: Page, writers: list[Writer]) -> None:
    say(page, "overload at first")
    page.until(f"document.querySelector('.error')?.innerText && {DONE}")
    say(page, "break a short one")  # half an answer is one
    page.until(f"document.querySelectorAll('.error:not([hidden])').length === 2 && {DONE}")
    say(page, "now a short one")
    page.until(f"document.querySelectorAll('article').length === 6 && {DONE}")
    told = writers[0].tokenizer.decode(list(writers[0].requests[-1].prompt))
    assert [told.count(part) for part in ("overload", "break a short one", "0 1 2", "now a")] == [0, 1, 1, 1]


def test_dark_and_light(page: Page) -> None:
    colours = []
    for dark in (False, True):
        page.resize(*PHONE, dark=dark)
        colours.append(page.value("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(250, 249, 246)", "rgb(22, 24, 22)"]


def test_it_needs_nothing_from_elsewhere(page: Page, url: str) -> None:
    loaded = page.value("performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert all(name.startswith((url, "data:")) for name in loaded), loaded
