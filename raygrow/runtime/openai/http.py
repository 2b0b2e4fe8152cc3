"""What stands around every call: an id, the API key, a limit on bodies, a count; and a watch on who hangs up.

Plain ASGI, since anything that wraps responses hides from them that the client has gone.
"""

import asyncio
import hmac
import re
import uuid
from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raygrow.runtime.openai.errors import ApiError, as_api_error
from raygrow.runtime.openai.metrics import Metrics

OPEN_PATHS = ("/", "/health")
"""Need no key: the page, which asks for one, and whether the server lives."""
REQUEST_ID = re.compile(r"[\w.:/=+-]{1,128}", re.ASCII)
CLIENT_GONE = 499
SECONDS_TO_SEND = 120
"""A body takes at most; who sends slower would keep a place from others."""

T = TypeVar("T")


class Gate:
    """What a call has to pass before the app sees it.

    Args:
        app: The app.
        api_key: What callers have to show as a Bearer token; None lets all in.
        max_request_bytes: Of a body.
        metrics: Counts.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, max_request_bytes: int, metrics: Metrics) -> None:
        self._app, self._limit, self._metrics = app, max_request_bytes, metrics
        self._api_key = None if api_key is None else api_key.strip()  # secrets in files often end with a new line

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        begun = False

        async def send_on(message: Message) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
                route = getattr(scope.get("route"), "path", "other")  # anybody can ask for any path
                self._metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        try:
            self._check_key(scope, headers)
            receive = await self._whole_body(headers, receive)
        except ApiError as error:
            await error.response(scope, receive, send_on)
            return
        try:
            await self._app(scope, receive, send_on)
        except Exception as error:  # here, so that it has an id and is counted like any other
            if begun:
                raise
            await as_api_error(error).response(scope, receive, send_on)

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/")) or "/"
        if self._api_key is None or path in OPEN_PATHS:
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode("latin-1"), self._api_key.encode()):
            raise ApiError(
                "the API key is missing or wrong; send it as the header Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    async def _whole_body(self, headers: Headers, receive: Receive) -> Receive:
        """Reads the body, and gives it again to whoever asks next.

        Raises:
            ApiError: If it is too large, or does not come.
        """
        announced = headers.get("content-length", "0")
        too_large = announced.isascii() and announced.isdigit() and int(announced[:20]) > self._limit
        messages: list[Message] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(SECONDS_TO_SEND):
                while more and not too_large:
                    message = await receive()
                    messages.append(message)
                    size += len(message.get("body", b""))
                    more, too_large = message.get("more_body", False), size > self._limit
        except TimeoutError:
            reason = f"the body did not arrive within {SECONDS_TO_SEND} s"
            raise ApiError(reason, status=408, code="request_timeout") from None
        if too_large:
            raise ApiError(f"the body is larger than {self._limit} bytes", status=413, code="request_too_large")

        async def receive_again() -> Message:
            return messages.pop(0) if messages else await receive()

        return receive_again


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def while_connected(request: Request, work: Callable[[], Awaitable[T]]) -> T:
    """Does the work, unless the client hangs up meanwhile: then it is cancelled.

    Raises:
        ClientGone: If the client has hung up.
    """

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work()), asyncio.ensure_future(hung_up())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


class EventStream(Response):
    """Server-sent events. Its source is closed as soon as the client hangs up, even while it has nothing to send.

    Args:
        request: Of the client.
        events: Makes the bytes to send; is closed in any case.
    """

    media_type = "text/event-stream"

    def __init__(self, request: Request, events: Callable[[Send], Awaitable[None]]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._request, self._events = request, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            await while_connected(self._request, lambda: self._events(send))
        except (ClientGone, OSError):
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})
