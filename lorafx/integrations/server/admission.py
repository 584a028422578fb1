"""What is admitted to the handlers: requests up to a number, bodies up to a size, and each as long
as its client is there."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.datastructures import Headers
from starlette.routing import get_route_path

from lorafx.integrations.server.errors import RequestError, error_response
from lorafx.integrations.server.request_log import GENERATING


class Admission:
    """ASGI middleware. A request to generate is answered with status 429 while `most` of them are
    under way, and any request with 413 if its body has more than `largest` bytes; None is no limit.
    When a client goes away, the task that answers it is cancelled."""

    def __init__(self, app: Any, most: int | None, largest: int | None) -> None:
        self._app, self._most, self._largest = app, most, largest
        self._under_way = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":  # no other route reads a body
            await self._app(scope, receive, send)
            return
        generates = get_route_path(scope) in GENERATING
        self._under_way += generates
        try:
            if generates and self._most is not None and self._under_way > self._most:
                raise RequestError(
                    f"{self._most} requests are being answered or wait, which is the most that "
                    "--max-queue allows; ask again later",
                    status=429,
                    code="queue_full",
                )
            body = await self._body(Headers(scope=scope), receive)
        except RequestError as error:
            refusal = error_response(error)
            if error.status == 429:
                refusal.headers["Retry-After"] = "1"
            await refusal(scope, receive, send)
        else:
            if body is not None:
                await self._answer(scope, body, receive, send)
        finally:
            self._under_way -= generates

    async def _body(self, headers: Headers, receive: Any) -> bytes | None:
        """The whole body; None if the client goes away before its end. Raises RequestError as soon
        as it is known to be too large."""
        given, body, more = headers.get("content-length", ""), bytearray(), True
        size = int(given) if given.isdigit() else 0
        while True:
            if self._largest is not None and max(size, len(body)) > self._largest:
                text = (
                    f"the body has more than {self._largest} bytes, which --max-body-bytes allows"
                )
                raise RequestError(text, status=413)
            if not more:
                return bytes(body)
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)

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

        answering = asyncio.create_task(self._app(scope, read, write))
        leaving = asyncio.create_task(leave())
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not complete:
                answering.cancel()  # does nothing if it has failed
            await asyncio.wait((answering,))
            if not answering.cancelled():
                answering.result()
        finally:
            answering.cancel()
            leaving.cancel()
