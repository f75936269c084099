"""Why a request is not answered, in the shape of OpenAI's errors."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence as Seq
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from specdec.async_engine import EngineClosed, EngineDead, QueueFull, StepFailed
from specdec.pages import OutOfPages

RETRY_AFTER_S = 1
logger = logging.getLogger(__name__)


class Refusal(Exception):
    """An answer other than 200: its status, OpenAI's type, parameter and code, and a message that says what would be valid."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code

    @property
    def body(self) -> dict[str, Any]:
        kinds = {404: "not_found_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        headers = {"Retry-After": str(RETRY_AFTER_S)} if self.status in (429, 503) else None
        return JSONResponse(self.body, self.status, headers)


def refusal_of(error: Exception, params: Seq[str] = ()) -> Refusal:
    """What an exception of the engine means to the client; `params` are the names that its message may begin with."""
    message = str(error) or type(error).__name__
    if isinstance(error, Refusal):
        return error
    if isinstance(error, QueueFull):
        return Refusal(message, status=429, code="queue_full")
    if isinstance(error, EngineClosed):
        return Refusal(message, status=503, code="shutting_down")
    if isinstance(error, EngineDead):
        return Refusal(message, status=503, code="engine_dead")
    if isinstance(error, StepFailed):
        return Refusal(message, status=500, code="step_failed")
    if isinstance(error, OutOfPages):
        return Refusal(message, code="never_fits")
    if isinstance(error, ValueError):
        found = re.match(r"(\w+)=", message)
        too_long = "shorten the prompt" in message
        return Refusal(
            message,
            param=found[1] if found and found[1] in params else None,
            code="context_length_exceeded" if too_long else None,
        )
    return Refusal(f"internal error: {type(error).__name__}: {message}", status=500)


def of_validation(error: ValidationError) -> Refusal:
    """The first thing that is wrong with a body, and the value that is."""
    first = error.errors()[0]
    kind, place = first["type"], first["loc"]
    if not place:
        return Refusal("the body must be a JSON object, sent with Content-Type: application/json")
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    if kind == "missing":
        return Refusal(f"{param} is missing: give it", param=param)
    if kind == "refused":
        return Refusal(f"{param}: {first['msg']}", param=param)
    shown = repr(first["input"])
    shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
    return Refusal(f"{param}={shown}: {first['msg']}", param=param)


def install(app: FastAPI) -> None:
    """Every error of the app in OpenAI's shape, those of the framework included."""

    async def refused(request: Request, error: Exception) -> JSONResponse:
        return refusal_of(error).response

    async def failed(request: Request, error: Exception) -> JSONResponse:
        # One failed step is told to those it hit and survived; what nobody foresaw also closes the connection.
        logger.error("a step failed", exc_info=error)
        return refusal_of(error).response

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}"
        response = Refusal(message, status=error.status_code).response
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(StepFailed, failed)
    app.add_exception_handler(Exception, refused)
