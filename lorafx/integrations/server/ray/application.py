"""What `serve run lorafx.integrations.server.ray:build key=value` starts.

An ingress receives the requests. It reads which adapter a request asks for and sends it to a
replica that has loaded this adapter, or to another one if that replica dies.
"""

# No `from __future__ import annotations`: Ray reads from an annotation which class `build` takes.
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, Json
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.serve import Application
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.routing import Router, get_route_path
from starlette.websockets import WebSocketClose

from lorafx.integrations.server.errors import Authentication, RequestError, error_response
from lorafx.integrations.server.fields import adapters_named
from lorafx.integrations.server.ray.replica import Replica
from lorafx.integrations.server.responses import event_line
from lorafx.integrations.server.settings import ModelSettings

#: Requests that an ingress may relay at once. It has no model, so the replicas are the limit.
RELAYED = 10_000

#: How many replicas may die while they answer one request.
ATTEMPTS = 4
#: The fields of a request's ASGI scope that a replica needs.
SCOPE = (
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "root_path"),
    *("query_string", "headers", "client", "server"),
)
STREAM = b"text/event-stream"
NO_METRICS = (
    "each replica counts for itself, so there is no one answer; Ray exports the numbers of all "
    "replicas to Prometheus"
)


def _split(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else value


class RaySettings(ModelSettings):
    """How a model is served on Ray (docs/guides/ray.md). Paths are the same on all machines. Raises
    what `ModelSettings` raises.

    Attributes:
        held: how many adapters a replica keeps in host memory: those that were requested last.
            `max_adapters` of them have a slot on the device.
        num_replicas: the number of engines, or "auto".
        num_gpus, num_cpus: those of each engine.
        num_ingresses: the number of processes that send requests to replicas.
        max_ongoing_requests: how many a replica answers at once; others wait at the ingress.
        drain: seconds for which a stopped replica waits until its running requests are answered.
        deployment: options of `serve.deployment` for the replicas, which override the settings
            above; JSON on a command line.
    """

    adapters: Annotated[Path, AfterValidator(Path.absolute)]
    target: Annotated[tuple[str, ...], BeforeValidator(_split)] = ()
    api_key: str | None = Field(
        default_factory=lambda: os.environ.get("LORAFX_API_KEY"), repr=False
    )
    drain: int = Field(default=600, ge=0)
    held: int = Field(default=64, ge=1)
    num_replicas: int | Literal["auto"] | None = None
    num_gpus: float = Field(default=0, ge=0)
    num_cpus: float = Field(default=1, ge=0)
    num_ingresses: int = Field(default=1, ge=1)
    max_ongoing_requests: int = Field(default=256, ge=1)
    deployment: dict[str, Any] | Json[dict[str, Any]] = Field(default_factory=dict)

    def absolute(self) -> "RaySettings":
        """The same settings with absolute paths: replicas run in another working directory."""
        paths = {}
        if self.cache and self.cache != "auto":
            paths["cache"] = str(Path(self.cache).absolute())
        if Path(self.model).is_dir():
            paths["model"] = str(Path(self.model).absolute())
        return self.model_copy(update=paths)

    def replicas(self) -> dict[str, Any]:
        """The options of the replicas' deployment."""
        options: dict[str, Any] = {
            "max_ongoing_requests": self.max_ongoing_requests,
            "graceful_shutdown_timeout_s": self.drain,
        }
        if self.num_replicas is not None:
            options["num_replicas"] = self.num_replicas
        actor = {"num_gpus": self.num_gpus, "num_cpus": self.num_cpus}
        actor |= self.deployment.get("ray_actor_options", {})
        return {**options, **self.deployment, "ray_actor_options": actor}


class Answer:
    """An answer that is relayed to the client. A stream is sent at once; any other answer when it
    is complete, so that until then another replica can answer. `begun`: some of it was sent."""

    def __init__(self, send: Any) -> None:
        self._send = send
        self.begun = False
        self.restart()

    def restart(self) -> None:
        """Drop what has not been sent: another replica answers from the start."""
        self._unsent: list[dict[str, Any]] = []
        self._stream = False

    async def take(self, messages: list[dict[str, Any]]) -> None:
        """Add messages of the replica."""
        for message in messages:
            self._unsent.append(message)
            if message["type"] == "http.response.start":
                headers = dict(message["headers"])
                self._stream = headers.get(b"content-type", b"").startswith(STREAM)
            elif self._stream:
                await self.end()

    async def end(self) -> None:
        """Send the messages that have not been sent."""
        while self._unsent:
            self.begun = True
            await self._send(self._unsent.pop(0))

    async def break_off(self) -> None:
        """End a stream with an error: no other replica can continue it."""
        message = "the replica that was answering failed; what has come is not the whole answer"
        code = "replica_failed"
        error = {"message": message, "type": "server_error", "param": None, "code": code}
        # The events of /v1/responses are told apart by `type`, those of /v1/messages by name, too.
        event = {"type": "error", "code": code, "message": message, "error": error}
        data = event_line(event).encode()
        await self._send({"type": "http.response.body", "body": data, "more_body": False})


class Ingress:
    """Ray's deployment that relays requests to replicas."""

    def __init__(self, replicas: DeploymentHandle, settings: ModelSettings) -> None:
        self._replicas = replicas.options(stream=True)
        self._settings = settings

    def __serve_build_asgi_app__(self) -> Router:
        """The ASGI application, for Ray. It checks the key before a replica loads an adapter."""
        return Router(default=Authentication(self.relay, self._settings.api_key))

    async def relay(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request (ASGI)."""
        if scope["type"] != "http":
            await WebSocketClose()(scope, receive, send)
            return
        answer = Answer(send)
        refusal: RequestError | None = RequestError(NO_METRICS, status=404)
        if get_route_path(scope) != "/metrics":
            refusal = await self._try_replicas(scope, receive, answer)
        if answer.begun and refusal is not None:
            await answer.break_off()
        elif refusal is not None:
            await error_response(refusal)(scope, receive, send)

    async def _try_replicas(self, scope: Any, receive: Any, answer: Answer) -> RequestError | None:
        """Have a replica answer. Returns the error if none has, or not to the end."""
        body = await Request(scope, receive).body()
        # A request for an unknown adapter goes to any replica, which refuses it.
        replicas = self._replicas.options(multiplexed_model_id=self._adapter(body))
        fields = {name: scope[name] for name in SCOPE if name in scope}
        replicas_ended = RequestError(
            f"{ATTEMPTS} replicas ended while they answered; ask again", status=503
        )
        for _ in range(ATTEMPTS):
            answer.restart()
            messages: Any = replicas.answer.remote(fields, body)
            try:
                async for ready in messages:
                    await answer.take(ready)
                await answer.end()
                return None
            except (RayActorError, ObjectLostError):  # the replica has died or is unreachable
                if answer.begun:
                    return replicas_ended
            except (BackPressureError, DeploymentUnavailableError) as error:
                return RequestError(str(error), status=503)
            except RayTaskError as error:
                return RequestError(f"the replica failed: {error.cause}", status=500)
            finally:
                messages.cancel()  # does nothing unless the client has disconnected
        return replicas_ended

    def _adapter(self, body: bytes) -> str:
        """The adapter that a request asks for; "" for the base, and for a request that the
        application will refuse."""
        try:
            fields = json.loads(body)
            named = [fields.get("model"), *adapters_named(fields).values()]
        except (ValueError, AttributeError, RecursionError, RequestError):
            return ""
        models = [name for name in named if isinstance(name, str)]
        asked = (adapter for model in models for adapter in self._settings.may_mean(model))
        return next((a for a in asked if self._settings.folder_of(a) is not None), "")


def build(args: RaySettings) -> Application:
    """An application for `serve.run`; also a builder for `serve run` and configuration files."""
    settings, options = args.absolute(), args.replicas()
    replicas = serve.deployment(name="Replica", **options)(Replica)
    ingress = serve.deployment(
        name="Ingress",
        num_replicas=args.num_ingresses,
        max_ongoing_requests=RELAYED,
        graceful_shutdown_timeout_s=args.drain,
    )(serve.ingress()(Ingress))
    return ingress.bind(replicas.bind(settings, args.held), settings)
