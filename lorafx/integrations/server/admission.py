"""What is admitted to the handlers: requests up to a number of sequences, bodies up to a size, and
each as long as its client is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from anyio import CancelScope
from fastapi import Request
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.routing import get_route_path

from lorafx.integrations.server.errors import RequestError, error_response
from lorafx.integrations.server.request_log import ENCODING, GENERATING, current_record

#: The routes that take tensors, and the type of such a body.
UPLOADS = ("/v1/load_lora_adapter", "/update_weights")
BINARY = "application/octet-stream"


def is_upload(scope: Any) -> bool:
    """Whether the body of a request is a file of tensors."""
    kind = Headers(scope=scope).get("content-type", "").partition(";")[0]
    return get_route_path(scope) in UPLOADS and kind.strip().lower() == BINARY


async def pieces_of(request: Request, most: int | None, option: str) -> AsyncIterator[bytes]:
    """The body of a request, of at most `most` bytes, as `option` says; None is no limit. Raises
    RequestError, with status 413 as soon as the body is known to be too large, and ClientDisconnect
    if its client goes away."""
    given, read = request.headers.get("content-length", ""), 0
    size, pieces = int(given) if given.isdigit() else 0, request.stream()
    while True:
        if most is not None and max(size, read) > most:
            text = f"the body has more than {most} bytes, which {option} allows"
            raise RequestError(text, status=413)
        if (piece := await anext(pieces, None)) is None:
            return
        read += len(piece)
        yield piece


class Queue:
    """Places for the sequences of requests that are answered or wait, `most` at a time; None is no
    limit."""

    def __init__(self, most: int | None) -> None:
        self._most, self._taken = most, 0

    def take(self, places: int, had: int = 0) -> None:
        """Give the current request `places` until it has ended, of which it `had` some before.
        Raises RequestError, with status 429 if they are not free, and 400 if they never can be."""
        if self._most is not None and places > self._most:
            raise RequestError(
                f"the request asks for {places} sequences, and --max-queue allows {self._most}; "
                "send fewer prompts at a time, or a smaller `n`"
            )
        more = places - had
        if self._most is not None and self._taken + more > self._most:
            raise RequestError(
                f"{self._taken} sequences are being answered or wait, and --max-queue allows "
                f"{self._most}; ask again later",
                status=429,
                code="queue_full",
            )
        self._taken += more
        current_record().at_end.append(partial(self._leave, more))

    def _leave(self, places: int) -> None:
        self._taken -= places


class Admission:
    """ASGI middleware. A request to generate or encode takes a place in `queue` before its body is
    read, and any request is answered with status 413 if its body has more than `largest` bytes;
    None is no limit. When a client goes away, the task that answers it is cancelled. Uploads pass:
    their handlers read them."""

    def __init__(self, app: Any, queue: Queue, largest: int | None) -> None:
        self._app, self._queue, self._largest = app, queue, largest

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        # No other route reads a body.
        if scope["type"] != "http" or scope["method"] != "POST" or is_upload(scope):
            await self._app(scope, receive, send)
            return
        try:
            if get_route_path(scope) in GENERATING + ENCODING:
                self._queue.take(1)
            pieces = pieces_of(Request(scope, receive), self._largest, "--max-body-bytes")
            body = b"".join([piece async for piece in pieces])
        except RequestError as error:
            await error_response(error)(scope, receive, send)
        except ClientDisconnect:
            return
        else:
            await self._answer(scope, body, receive, send)

    async def _answer(self, scope: Any, body: bytes, receive: Any, send: Any) -> None:
        unread = [{"type": "http.request", "body": body, "more_body": False}]
        complete = False

        async def read() -> Any:
            if unread:
                return unread.pop()
            return await asyncio.get_running_loop().create_future()  # until it is cancelled

        async def write(message: Any) -> None:
            nonlocal complete
            complete = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        async def leave() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            if not complete:
                answering.cancel()

        with CancelScope() as answering:
            leaving = asyncio.create_task(leave())
            try:
                await self._app(scope, read, write)
            finally:
                leaving.cancel()
