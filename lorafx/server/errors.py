"""Errors, answered in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from transformers.cli.serving.utils import CBWorkerDeadError

from lorafx.errors import BatchError, LorafxError, Setting, UnknownAdapterError
from lorafx.server.settings import Settings, option


class RequestError(LorafxError):
    """A request that is refused.

    Args:
        status: of the answer.
        message: what is wrong, and the way out.
        param: the field that is wrong.
        code: one of OpenAI's codes, where it has one.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


#: The status of errors that come from below. A BatchError says that the engine takes no requests.
_STATUS: Mapping[type[LorafxError], int] = {
    UnknownAdapterError: 404,
    BatchError: 503,
}


def status_of(error: BaseException) -> int:
    """The status that an error is answered with."""
    if isinstance(error, RequestError):
        return error.status
    if isinstance(error, HTTPException):
        return error.status_code
    if isinstance(error, CBWorkerDeadError):
        return 503
    return next((status for cls, status in _STATUS.items() if isinstance(error, cls)), 500)


def error_response(error: Exception) -> JSONResponse:
    """The answer to a request that ends with this error."""
    return _answer(
        status_of(error),
        message_of(error),
        getattr(error, "param", None),
        getattr(error, "code", None),
    )


def message_of(error: Exception) -> str:
    """What is wrong, and the way out by options of `lorafx serve`, not by fields of LoraConfig."""
    return error.spelled(_as_option) if isinstance(error, LorafxError) else str(error)


def _as_option(setting: Setting) -> str:
    if setting.name == "target_modules":
        return "--target when lorafx serve starts"
    known = setting.name in (field.name for field in fields(Settings))
    if known and setting.value is not None:
        return f"start lorafx serve with {option(setting.name)} {setting.value}"
    if setting.given:
        return "start lorafx serve with this adapter among --adapters"
    return setting.text


def answer_errors(app: FastAPI) -> None:
    """Have `app` answer all errors in OpenAI's form."""

    async def lorafx_error(_: Request, error: Exception) -> JSONResponse:
        return error_response(error)

    async def http_error(_: Request, error: Exception) -> JSONResponse:
        return _answer(status_of(error), str(getattr(error, "detail", error)))

    async def malformed(_: Request, error: Exception) -> JSONResponse:
        return _answer(400, f"the body is not a JSON object: {_malformed(error)}")

    app.add_exception_handler(LorafxError, lorafx_error)
    app.add_exception_handler(CBWorkerDeadError, lorafx_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, malformed)


def _malformed(error: Any) -> str:
    """What FastAPI found, without the place in its code that it adds."""
    found = error.errors()[0]
    if found["type"] == "json_invalid":
        return f"{found['ctx']['error']}, at character {found['loc'][-1]}"
    given = found.get("input")
    if isinstance(given, bytes):
        return "its Content-Type has to be application/json"
    return "it is empty" if given is None else f"it is {json.dumps(given):.80}"


def _answer(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse(
        {"error": {"message": message, "type": kind, "param": param, "code": code}}, status
    )
