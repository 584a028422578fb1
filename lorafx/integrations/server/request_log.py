"""What is known of each HTTP request: middleware makes a record of it, the handler that answers
writes into it, and when the answer has ended it becomes a line of the log and counts.

    POST /v1/completions 200 adapter=sql tokens=12+16 first=0.021 s whole=0.250 s
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any
from urllib.parse import quote
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import get_route_path
from transformers.cli.serving.utils import X_REQUEST_ID

from lorafx.adapter_store.names import BASE
from lorafx.generation.continuous.adapter_requests import SequenceOutput
from lorafx.integrations.server.errors import OPEN_ROUTES
from lorafx.integrations.server.metrics import UNKNOWN, Metrics

#: Has a line for each request, at level INFO; for probes and Prometheus at level DEBUG.
LOG = logging.getLogger("lorafx.requests")
#: The routes that generate, and those that encode. Requests for both are counted.
GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
ENCODING = (
    *("/v1/embeddings", "/pooling", "/classify", "/score", "/v1/score"),
    *("/rerank", "/v1/rerank", "/v2/rerank"),
)

_CURRENT: ContextVar[RequestRecord] = ContextVar("record")


def current_record() -> RequestRecord:
    """The record of the request that this task answers. Outputs of the engine are delivered outside
    of it, so what they are delivered to has to keep the record."""
    return _CURRENT.get()


class RequestRecord:
    """One request, which arrives when this is made.

    Attributes:
        adapter: the name of its adapter; `UNKNOWN` until a handler calls `asks_for`.
        prompt_tokens: handlers add the length of each prompt.
        first_token: seconds from its arrival to the first token; None before it.
        at_end: is called when the request has ended in any way, also before its answer has begun.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._arrived = time.perf_counter()
        self._generated: dict[str, int] = {}
        self.adapter = UNKNOWN
        self.prompt_tokens = 0
        self.first_token: float | None = None
        self.at_end: list[Callable[[], None]] = []

    @property
    def generated_tokens(self) -> int:
        """The number of tokens that were generated, of all of its sequences."""
        return sum(self._generated.values())

    @property
    def seconds(self) -> float:
        """The time since its arrival."""
        return time.perf_counter() - self._arrived

    def __str__(self) -> str:
        known = f"tokens={self.prompt_tokens}+{self.generated_tokens} "
        known = "" if self.adapter == UNKNOWN else f"adapter={self.adapter} {known}"
        first = "" if self.first_token is None else f"first={self.first_token:.3f} s "
        return f"{known}{first}whole={self.seconds:.3f} s"

    def asks_for(self, adapter: str | None) -> None:
        """Record its adapter; None is the base."""
        self.adapter = BASE if adapter is None else adapter

    def delivered(self, output: SequenceOutput) -> None:
        """Record an output of the engine for one of its sequences. Of a stream that is each output,
        and otherwise the last one. The engine has to record timestamps."""
        self._generated[output.request_id] = len(output.generated_tokens)
        if self.first_token is None and output.timestamps:
            self.first_token = output.timestamps[0] - self._arrived
            self._metrics.observe("time_to_first_token_seconds", self.first_token)
        if output.is_finished():
            self._metrics.sequence_ended(self.adapter, output)

    def ended(self, status: int) -> None:
        """Count the request. The status is 499 if the client went away before the answer's end."""
        tokens = {"prompt": self.prompt_tokens, "generation": self.generated_tokens}
        self._metrics.request_ended(self.adapter, status, self.seconds, tokens)


class RequestLog:
    """ASGI middleware that logs and counts requests, and gives each an ID where its client has not;
    handlers find it in the request's state, and clients in the answer's headers."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record, path = RequestRecord(self._metrics), get_route_path(scope)
        name = Headers(scope=scope).get(X_REQUEST_ID) or str(uuid4())
        scope.setdefault("state", {})["request_id"] = name
        begun, status = 500, 499

        async def note(message: Any) -> None:
            nonlocal begun, status
            if message["type"] == "http.response.start":
                begun = message["status"]
                MutableHeaders(scope=message)[X_REQUEST_ID] = name
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                status = begun

        counted, before = path in GENERATING + ENCODING, _CURRENT.set(record)
        if counted:
            self._metrics.running.inc()
        try:
            await self._app(scope, receive, note)
        except Exception:
            status = 500
            raise
        finally:
            _CURRENT.reset(before)
            for end in record.at_end:
                end()
            if counted:
                self._metrics.running.dec()
                record.ended(status)
            level = logging.DEBUG if path in OPEN_ROUTES else logging.INFO
            LOG.log(level, "%s %s %d %s", scope["method"], quote(path), status, record)
