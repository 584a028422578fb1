"""The application: transformers' own, without the routes that are not for a server of one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from transformers.cli.serving.server import build_server

from lorafx.server.errors import Authentication, answer_errors
from lorafx.server.generating import Generation
from lorafx.server.handlers import Chat, Completions, Responses
from lorafx.server.metrics import Metrics
from lorafx.server.runtime_loading import AdapterLoading
from lorafx.server.served_model import ServedModel
from lorafx.serving.continuous.manager import AdapterBatchingManager

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
