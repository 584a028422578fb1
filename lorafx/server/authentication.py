"""The key that requests have to come with, as OpenAI's clients send it."""

from __future__ import annotations

import hmac
from typing import Any

from starlette.datastructures import Headers
from starlette.routing import get_route_path

from lorafx.server.errors import RequestError, error_response

#: Routes that ask for no key: what watches a server has none.
OPEN = ("/health", "/metrics")


class Authentication:
    """ASGI middleware that answers requests without the key with a 401, before anything is read of
    them.

    Args:
        app: answers the others.
        key: the key, of visible ASCII characters; None asks for none.
    """

    def __init__(self, app: Any, key: str | None) -> None:
        self._app = app
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request, or have it answered."""
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
        refusal = error_response(RequestError(401, text, code="invalid_api_key"))
        refusal.headers["WWW-Authenticate"] = "Bearer"
        await refusal(scope, receive, send)
