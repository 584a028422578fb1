"""Errors, answered in OpenAI's form: {"error": {"message", "type", "param", "code"}}; and the key
that requests have to come with, as OpenAI's clients send it."""

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
from transformers.cli.serving.utils import CBWorkerDeadError

from lorafx.errors import BatchError, LorafxError, UnknownAdapterError, respelled
from lorafx.integrations.server.settings import ModelSettings, option

#: Routes that ask for no key: what watches a server has none.
OPEN = ("/health", "/metrics")


class RequestError(LorafxError):
    """A request that is refused: the field that is wrong, the status of the answer, and one of
    OpenAI's codes, where it has one."""

    def __init__(
        self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code


def status_of(error: BaseException) -> int:
    """The status that an error is answered with."""
    if isinstance(error, RequestError):
        return error.status
    if isinstance(error, HTTPException):
        return error.status_code
    if isinstance(error, RequestValidationError):
        return 400
    if isinstance(error, UnknownAdapterError):
        return 404
    # A BatchError of the engine: it takes no requests.
    return 503 if isinstance(error, (CBWorkerDeadError, BatchError)) else 500


def message_of(error: Exception) -> str:
    """What is wrong, and the way out by options of `lorafx serve`, not by fields of LoraConfig."""
    if isinstance(error, HTTPException):
        return str(error.detail)
    if isinstance(error, RequestValidationError):
        return f"the body is not a JSON object: {_malformed(error)}"
    return respelled(str(error), _as_option)


def error_response(error: Exception) -> JSONResponse:
    """The answer to a request that ends with this error."""
    status = status_of(error)
    told = {
        "message": message_of(error),
        "type": "invalid_request_error" if status < 500 else "server_error",
        "param": getattr(error, "param", None),
        "code": getattr(error, "code", None),
    }
    return JSONResponse({"error": told}, status)


def answer_errors(app: FastAPI) -> None:
    """Have `app` answer all errors in OpenAI's form."""

    async def answered(_: Request, error: Exception) -> JSONResponse:
        return error_response(error)

    for kind in (LorafxError, CBWorkerDeadError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, answered)


def _as_option(field: str, value: str | None, given: bool) -> str | None:
    if field == "target_modules":
        return "--target when lorafx serve starts"
    if field in ModelSettings.model_fields and value is not None:
        return f"start lorafx serve with {option(field)} {value}"
    return "start lorafx serve with this adapter among --adapters" if given else None


def _malformed(error: RequestValidationError) -> str:
    """What FastAPI found, without the place in its code that it adds."""
    found = error.errors()[0]
    if found["type"] == "json_invalid":
        return f"{found['ctx']['error']}, at character {found['loc'][-1]}"
    given = found.get("input")
    if isinstance(given, bytes):
        return "its Content-Type has to be application/json"
    return "it is empty" if given is None else f"it is {json.dumps(given):.80}"


class Authentication:
    """ASGI middleware that answers requests without the key with a 401, before anything is read of
    them. Without a key all are answered."""

    def __init__(self, app: Any, key: str | None) -> None:
        self._app = app
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        # There are no routes for websockets.
        if self._key is None or scope["type"] != "http" or get_route_path(scope) in OPEN:
            await self._app(scope, receive, send)
            return
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            text = "this server asks for its key, as `Authorization: Bearer KEY`"
        elif not hmac.compare_digest(given.strip().encode(), self._key):
            text = "the key in `Authorization: Bearer KEY` is not this server's"
        else:
            await self._app(scope, receive, send)
            return
        refusal = error_response(RequestError(text, status=401, code="invalid_api_key"))
        refusal.headers["WWW-Authenticate"] = "Bearer"
        await refusal(scope, receive, send)
