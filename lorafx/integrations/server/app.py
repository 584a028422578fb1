"""The application: transformers' own, without the routes that are not for a server of one model.

Clients may load and unload adapters, from one folder and only where that is switched on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from transformers.cli.serving.server import build_server

from lorafx.adapter_store.names import BASE
from lorafx.compiled_model.compiled import CompiledModel
from lorafx.errors import LorafxError, nearest
from lorafx.generation.continuous.manager import AdapterBatchingManager
from lorafx.integrations.server.errors import (
    Authentication,
    RequestError,
    answer_errors,
    message_of,
)
from lorafx.integrations.server.generating import Generation, ServedModel
from lorafx.integrations.server.handlers import Chat, Completions, Responses
from lorafx.integrations.server.metrics import Metrics
from lorafx.integrations.server.settings import UNPRINTABLE

#: transformers' routes that are kept. Others load any model, or unload this one.
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models")


def build_app(
    served: ServedModel,
    engine: AdapterBatchingManager,
    adapter_root: Path | None = None,
    api_key: str | None = None,
) -> FastAPI:
    """The application that answers for a model, over its engine, which runs. Clients may load
    adapters from `adapter_root`; with `api_key` they have to send it, but for /health and
    /metrics."""
    metrics = Metrics(served.compiled.stats, engine.health)
    generation = Generation(served, engine, metrics)
    absent: Any = None  # the handlers of routes that are not kept
    app = build_server(
        served,
        chat_handler=Chat(served, generation, metrics),
        completion_handler=Completions(served, generation, metrics),
        response_handler=Responses(served, generation, metrics),
        transcription_handler=absent,
        systemone_handler=absent,
        generation_state=generation,
    )
    app.router.routes[:] = [
        route for route in app.router.routes if getattr(route, "path", None) in ROUTES
    ]
    answer_errors(app)
    app.add_middleware(Authentication, key=api_key)
    loading = AdapterLoading(served.compiled, adapter_root)

    # Not coroutines: they read files, and FastAPI runs them in threads.
    @app.post("/v1/load_lora_adapter")
    def load_lora_adapter(body: dict) -> Response:
        return Response(loading.load(body), media_type="text/plain")

    @app.post("/v1/unload_lora_adapter")
    def unload_lora_adapter(body: dict) -> Response:
        return Response(loading.unload(body), media_type="text/plain")

    @app.get("/health")
    def health() -> JSONResponse:
        reason = engine.unhealthy()
        if reason is not None:
            return JSONResponse({"status": "unhealthy", "reason": reason}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    def counts() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


class AdapterLoading:
    """What /v1/load_lora_adapter and /v1/unload_lora_adapter do. Adapters lie in `root`; without it
    nothing is loaded or unloaded."""

    def __init__(self, compiled: CompiledModel, root: Path | None) -> None:
        self._compiled = compiled
        self._root = None if root is None else root.resolve()

    def load(self, body: dict[str, Any]) -> str:
        """Load the adapter in folder `lora_path` as `lora_name`, and say so."""
        root = self._allowed()
        name, path = _text(body, "lora_name"), _text(body, "lora_path")
        if not name.isprintable():
            raise RequestError(f"`lora_name` {UNPRINTABLE}; got {name!r}", "lora_name")
        if name == BASE:
            raise RequestError(f"{BASE!r} is the base model", "lora_name")
        if name in self._compiled.adapters and body.get("load_inplace") is not True:
            raise RequestError(
                f"an adapter {name!r} is loaded; unload it first, or send "
                '"load_inplace": true to replace it',
                "lora_name",
            )
        folder = _inside(root, path)
        try:
            self._compiled.load_adapter(folder, name)
        except LorafxError as error:
            raise RequestError(message_of(error), "lora_path") from error
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body: dict[str, Any]) -> str:
        """Unload `lora_name`, and say so. Requests that it is serving go on."""
        self._allowed()
        name, known = _text(body, "lora_name"), self._compiled.adapters
        if name not in known:
            raise RequestError(f"no adapter {name!r} is loaded{nearest(name, known)}", status=404)
        self._compiled.unload_adapter(name)
        return f"Success: LoRA adapter '{name}' removed successfully."

    def _allowed(self) -> Path:
        if self._root is None:
            raise RequestError(
                "this server loads and unloads no adapters on request; "
                "`lorafx serve --allow-runtime-loading` does",
                status=403,
            )
        return self._root


def _text(body: dict[str, Any], field: str) -> str:
    value = body.get(field)
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise RequestError(f"`{field}` is a non-empty string; got {value!r}", field)
    return value


def _inside(root: Path, path: str) -> Path:
    """The folder that `path` leads to, relative to `root`, which it and its files have to be in
    after all links have been followed. Where something is elsewhere, the error does not say what
    there is."""
    outside = RequestError(
        f"{path!r} is not inside the folder that adapters are loaded from", "lora_path", status=403
    )
    try:
        folder = (root / path).resolve()
        if not folder.is_relative_to(root):
            raise outside
        if not folder.is_dir():
            raise RequestError(f"there is no folder {path!r}", "lora_path", status=404)
        if any(not file.resolve().is_relative_to(root) for file in folder.iterdir()):
            raise outside
    except (OSError, RuntimeError) as error:  # a loop of links, a name that is too long
        raise outside from error
    return folder
