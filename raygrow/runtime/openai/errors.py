"""Errors as OpenAI's clients know them: `{"error": {"message", "type", "param", "code"}}` and a status that fits."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request

from raygrow.runtime.openai.model import Overloaded

logger = logging.getLogger(__name__)

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a client is told.

    Args:
        message: What is wrong, and what to do.
        status: Of HTTP.
        param: The field that is wrong.
        code: For programs to tell errors apart.
        headers: To send along.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": _text(self.message), "type": kind, "param": _text(self.param), "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """As an HTTP response."""
        return JSONResponse(self.body, status_code=self.status, headers=self.headers)


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of any exception. What it cannot mend is logged, and not described."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Overloaded):
        wait = {"retry-after": str(math.ceil(error.retry_after))}
        return ApiError(str(error), status=429, code="overloaded", headers=wait)
    if isinstance(error, RequestValidationError):
        return _of_validation(error)
    if isinstance(error, HTTPException):
        return ApiError(str(error.detail), status=error.status_code, headers=error.headers)
    logger.error("a request failed", exc_info=error)
    return ApiError("the server made a mistake; its log says which", status=500, code="internal_error")


def install(app: FastAPI) -> None:
    """Makes an app answer every exception in this shape."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response

    for kind in (ApiError, Overloaded, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def _text(text: str | None) -> str | None:
    """What can be sent: JSON can spell halves of characters, and messages may quote what clients have sent."""
    return None if text is None else text.encode(errors="replace").decode()


def _of_validation(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body, by the name of its field."""
    problems = error.errors()
    # a field may be one of several types, and each type that it is not is a problem; the deepest is the nearest miss
    first = max(problems, key=lambda problem: len(problem["loc"]))
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return ApiError(f"the body is no valid JSON: {reason}")
    place = [str(part) for part in first["loc"][1:] if not _names_a_type(part)]
    if "field" in first.get("ctx", {}):  # a problem between fields has no place of its own
        place.append(first["ctx"]["field"])
    if not place:
        return ApiError("the body must be a JSON object, sent with the header Content-Type: application/json")
    name = ".".join(place)
    return ApiError(f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}", param=name, code=first["type"])


def _names_a_type(part: str | int) -> bool:
    """Whether a part of a problem's place is pydantic's name for one of several types, and no field."""
    return isinstance(part, str) and (part in ("str", "int", "constrained-str", "constrained-int") or "[" in part)
