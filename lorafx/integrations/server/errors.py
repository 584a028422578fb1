"""Answers to errors in OpenAI's form, {"error": {"message", "type", "param", "code"}}; and the
check of the key, which OpenAI's clients send as a bearer token, and Anthropic's as X-Api-Key."""

from __future__ import annotations

import hmac
import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.routing import get_route_path
from typing_extensions import TypedDict

from lorafx.errors import BatchError, LorafxError, Setting, UnknownAdapterError, respelled
from lorafx.integrations.server.settings import ModelSettings, option

#: Routes that need no key, for probes and Prometheus.
OPEN_ROUTES = ("/health", "/ping", "/metrics")


class ErrorAnswer(TypedDict):
    """OpenAI's form of an error, with its `message`, `type`, `param` and `code`."""

    error: dict[str, str | None]


def refusals(*statuses: int) -> dict[int | str, Any]:
    """The errors of a route, as FastAPI takes them to describe it."""
    return {status: {"model": ErrorAnswer} for status in statuses}


class RequestError(LorafxError):
    """A refused request. `param` is the field that is wrong, `status` the answer's HTTP status,
    `code` OpenAI's code for the error, if it has one."""

    def __init__(
        self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code


def message_of(error: LorafxError) -> str:
    """The message of an error, with options of `lorafx serve` in place of fields of LoraConfig."""
    return respelled(error, _as_option)


def error_response(error: LorafxError) -> JSONResponse:
    """The answer to a request that ends with this error."""
    status = error.status if isinstance(error, RequestError) else 500
    if isinstance(error, UnknownAdapterError):
        status = 404
    elif isinstance(error, BatchError):  # the engine takes no requests
        status = 503
    fields = {
        "message": message_of(error),
        "type": "invalid_request_error" if status < 500 else "server_error",
        "param": getattr(error, "param", None),
        "code": getattr(error, "code", None),
    }
    again = {"Retry-After": "1"} if status == 429 else None
    return JSONResponse({"error": fields}, status, again)


def answer_errors(app: FastAPI) -> None:
    """Have `app` answer all errors in OpenAI's form."""

    @app.exception_handler(LorafxError)
    async def refuse(_: Request, error: LorafxError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def refuse_route(_: Request, error: HTTPException) -> JSONResponse:
        return error_response(RequestError(str(error.detail), status=error.status_code))

    @app.exception_handler(RequestValidationError)
    async def refuse_body(_: Request, error: RequestValidationError) -> JSONResponse:
        problem = error.errors()[0]
        place, *names = problem["loc"]
        if place == "query" or (names and isinstance(names[0], str)):
            return error_response(RequestError(f"`{names[0]}`: {problem['msg']}", str(names[0])))
        return error_response(RequestError(f"the body is not a JSON object: {_why_none(problem)}"))


def _as_option(setting: Setting) -> str | None:
    if setting.field == "target_modules":
        return "--target when lorafx serve starts"
    if setting.field in ModelSettings.model_fields and setting.value is not None:
        return f"start lorafx serve with {option(setting.field)} {setting.value!r}"
    return "start lorafx serve with this adapter among --adapters" if setting.given else None


def _why_none(problem: dict[str, Any]) -> str:
    """What FastAPI reports of a body, without the place in its own code."""
    if problem["type"] == "json_invalid":
        return f"{problem['ctx']['error']}, at character {problem['loc'][-1]}"
    body = problem.get("input")
    if isinstance(body, bytes):
        return "its Content-Type has to be application/json"
    return "it is empty" if body is None else f"it is {json.dumps(body):.80}"


class Authentication:
    """ASGI middleware that answers requests without the key with status 401, before it reads their
    bodies. If `key` is None, every request passes."""

    def __init__(self, app: Any, key: str | None) -> None:
        self._app = app
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        # There are no routes for websockets.
        if self._key is None or scope["type"] != "http" or get_route_path(scope) in OPEN_ROUTES:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if not scheme and "x-api-key" in headers:
            scheme, token = "bearer", headers["x-api-key"]
        if scheme.lower() != "bearer":
            text = "this server asks for its key, as `Authorization: Bearer KEY`"
        elif not hmac.compare_digest(token.strip().encode(), self._key):
            text = "the key in `Authorization: Bearer KEY` is not this server's"
        else:
            await self._app(scope, receive, send)
            return
        refusal = error_response(RequestError(text, status=401, code="invalid_api_key"))
        refusal.headers["WWW-Authenticate"] = "Bearer"
        await refusal(scope, receive, send)
