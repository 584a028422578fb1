"""What stands before the replicas: it reads which adapter a request asks for, sends the request to
a replica that holds it, and to another where that one dies."""

from __future__ import annotations

import json
from typing import Any

from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.routing import Router, get_route_path
from starlette.websockets import WebSocketClose

from lorafx.server.errors import Authentication, RequestError, error_response
from lorafx.server.settings import Settings

#: How many replicas may die of, or under, one request.
ATTEMPTS = 4
#: What a replica needs of a request's scope.
SCOPE = (
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "root_path"),
    *("query_string", "headers", "client", "server"),
)
STREAM = b"text/event-stream"
NO_METRICS = (
    "each replica counts for itself, so there is no one answer; Ray exports the numbers of all "
    "replicas to Prometheus"
)


class Ingress:
    """Ray's deployment of the relay."""

    def __init__(self, replicas: DeploymentHandle, settings: Settings) -> None:
        self._replicas = replicas.options(stream=True)
        self._settings = settings

    def __serve_build_asgi_app__(self) -> Router:
        """The application; Ray asks for it. Keys are looked at before a replica loads the adapter
        that is asked for."""
        return Router(default=Authentication(self.relay, self._settings.api_key))

    async def relay(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request (ASGI)."""
        if scope["type"] != "http":
            await WebSocketClose()(scope, receive, send)
            return
        answer = Answer(send)
        refusal: RequestError | None = RequestError(404, NO_METRICS)
        if get_route_path(scope) != "/metrics":
            refusal = await self._answered(scope, receive, answer)
        if answer.begun and refusal is not None:
            await answer.break_off()
        elif refusal is not None:
            await error_response(refusal)(scope, receive, send)

    async def _answered(self, scope: Any, receive: Any, answer: Answer) -> RequestError | None:
        """Have a replica answer; why none has, or has not to the end."""
        body = await Request(scope, receive).body()
        # A name that there is not goes to any replica, which refuses it.
        replicas = self._replicas.options(multiplexed_model_id=self._adapter(body))
        sent = {name: scope[name] for name in SCOPE if name in scope}
        ended = RequestError(503, f"{ATTEMPTS} replicas ended while they answered; ask again")
        for _ in range(ATTEMPTS):
            answer.restart()
            messages: Any = replicas.answer.remote(sent, body)
            try:
                async for ready in messages:
                    await answer.take(ready)
                await answer.end()
                return None
            except (RayActorError, ObjectLostError):  # the replica is gone, or out of reach
                if answer.begun:
                    return ended
            except (BackPressureError, DeploymentUnavailableError) as error:
                return RequestError(503, str(error))
            except RayTaskError as error:
                return RequestError(500, f"the replica failed: {error.cause}")
            finally:
                messages.cancel()  # where the client has gone; nothing otherwise
        return ended

    def _adapter(self, body: bytes) -> str:
        """The adapter that a request asks for; "" for the base, and for what the application is to
        refuse."""
        try:
            model = json.loads(body).get("model")
        except (ValueError, AttributeError, RecursionError):
            return ""
        name = self._settings.served_name
        if not isinstance(model, str) or not model.startswith(f"{name}:"):
            return ""
        adapter = model.removeprefix(f"{name}:")
        return adapter if self._settings.folder_of(adapter) is not None else ""


class Answer:
    """An answer on its way to the client. A stream is sent on as it comes; anything else when it is
    complete, so that another replica can still give it. `begun`: the client has got some of it."""

    def __init__(self, send: Any) -> None:
        self._send = send
        self.begun = False
        self.restart()

    def restart(self) -> None:
        """Another replica gives it, from the start."""
        self._kept: list[dict[str, Any]] = []
        self._stream = False

    async def take(self, messages: list[dict[str, Any]]) -> None:
        """More of it has come."""
        for message in messages:
            self._kept.append(message)
            if message["type"] == "http.response.start":
                headers = dict(message["headers"])
                self._stream = headers.get(b"content-type", b"").startswith(STREAM)
            elif self._stream:
                await self.end()

    async def end(self) -> None:
        """Send what has come."""
        while self._kept:
            self.begun = True
            await self._send(self._kept.pop(0))

    async def break_off(self) -> None:
        """End a stream with an error: no other replica can go on where this one stopped."""
        message = "the replica that was answering failed; what has come is not the whole answer"
        code = "replica_failed"
        error = {"message": message, "type": "server_error", "param": None, "code": code}
        # /v1/responses tells its events by `type`.
        event = {"type": "error", "code": code, "message": message, "error": error}
        data = f"data: {json.dumps(event)}\n\n".encode()
        await self._send({"type": "http.response.body", "body": data, "more_body": False})
