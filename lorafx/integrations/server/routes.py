"""The application: what is answered on each route, and the middlewares around all of them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse

import lorafx
from lorafx.integrations.server.admission import Admission
from lorafx.integrations.server.errors import Authentication, RequestError, answer_errors
from lorafx.integrations.server.generating import ServedModel
from lorafx.integrations.server.handlers import Chat, Completions, Handler, Responses
from lorafx.integrations.server.loading import AdapterLoading
from lorafx.integrations.server.metrics import Metrics
from lorafx.integrations.server.request_log import GENERATING, RequestLog
from lorafx.integrations.server.settings import Settings


def build_app(served: ServedModel) -> FastAPI:
    """The application that serves a model by its engine, which has to be running."""
    settings, metrics = served.settings, Metrics(served.compiled, served.engine, served.name)
    chat, completions = Chat(served), Completions(served)
    app = FastAPI(title="lorafx", version=lorafx.__version__, redoc_url=None)
    handlers = chat, completions, Responses(served)
    for path, handler in zip(GENERATING, handlers, strict=True):
        app.post(path, name=type(handler).__name__)(handler.handle)
    _add_models(app, served)
    _add_tokenizer(app, completions, chat)
    _add_loading(app, served.loading)

    @app.get("/version")
    def version() -> dict[str, str]:
        return {"version": lorafx.__version__}

    @app.get("/health")
    @app.get("/ping")
    @app.post("/ping")
    def health() -> JSONResponse:
        reason = served.engine.unhealthy()
        if reason is not None:
            return JSONResponse({"status": "unhealthy", "reason": reason}, 503)
        compiling = served.compiled.status().progress
        return JSONResponse({"status": "ok", **({"graphs": compiling} if compiling else {})})

    @app.get("/metrics")
    def counts() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    answer_errors(app)
    # Each is outside of those before it.
    app.add_middleware(Admission, queue=served.queue, largest=settings.max_body_bytes)
    app.add_middleware(Authentication, key=settings.api_key)
    if isinstance(settings, Settings):
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
        )
    app.add_middleware(RequestLog, metrics=metrics)
    return app


def _add_models(app: FastAPI, served: ServedModel) -> None:
    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": served.listed()}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        served.adapter_of(name)
        return served.entry(name)


def _add_tokenizer(app: FastAPI, completions: Completions, chat: Chat) -> None:
    served = completions.served

    def prompt_of(body: dict) -> list[int]:
        served.adapter_of(body.pop("model", served.name))
        route: Handler = chat if "messages" in body else completions
        prompts = route.prompts(route.fields.read(body))
        if len(prompts) > 1:
            raise RequestError("there is one prompt here, not a list of them", "prompt")
        return prompts[0].ids

    @app.post("/tokenize")
    def tokenize(body: dict) -> dict[str, Any]:
        named = body.pop("return_token_strs", False)
        ids = prompt_of(body)
        return {
            "count": len(ids),
            "max_model_len": served.most_tokens,
            "tokens": ids,
            "token_strs": served.tokenizer.convert_ids_to_tokens(ids) if named else None,
        }

    @app.post("/detokenize")
    def detokenize(body: dict) -> dict[str, Any]:
        tokens = body.get("tokens")
        if not isinstance(tokens, list) or prompt_of({**body, "prompt": tokens}) != tokens:
            raise RequestError(f"`tokens` is a list of token ids; got {tokens!r:.80}", "tokens")
        return {"prompt": served.tokenizer.decode(tokens)}


def _add_loading(app: FastAPI, loading: AdapterLoading) -> None:
    # Not coroutines: they read files, and FastAPI runs them in threads.
    @app.post("/v1/load_lora_adapter")
    def load_lora_adapter(body: dict) -> Response:
        return Response(loading.load(body), media_type="text/plain")

    @app.post("/v1/unload_lora_adapter")
    def unload_lora_adapter(body: dict) -> Response:
        return Response(loading.unload(body), media_type="text/plain")
