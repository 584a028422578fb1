"""The application: what is answered on each route, and the middlewares around all of them."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from fastapi import Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.routing import Match

import lorafx
from lorafx.integrations.server.admission import BINARY, UPLOADS, Admission, is_upload
from lorafx.integrations.server.control import PauseMode
from lorafx.integrations.server.encoding import Encoding
from lorafx.integrations.server.errors import Authentication, RequestError, answer_errors
from lorafx.integrations.server.generating import GeneratingModel, ServedModel
from lorafx.integrations.server.handlers import Chat, Completions, Handler, Responses
from lorafx.integrations.server.loading import AdapterLoading
from lorafx.integrations.server.metrics import Metrics
from lorafx.integrations.server.request_log import ENCODING, GENERATING, RequestLog
from lorafx.integrations.server.settings import Settings


def build_app(served: ServedModel) -> FastAPI:
    """The application that serves a model by its engine, which has to be running."""
    settings, metrics = served.settings, Metrics(served.compiled, served.engine, served.name)
    app = FastAPI(title="lorafx", version=lorafx.__version__, redoc_url=None)
    if isinstance(served, GeneratingModel):
        chat, completions = Chat(served), Completions(served)
        handlers = chat, completions, Responses(served)
        for path, handler in zip(GENERATING, handlers, strict=True):
            app.post(path, name=type(handler).__name__)(handler.handle)
        _add_tokenizer(app, completions, chat)
    else:
        for path in ENCODING:
            app.post(path, name=path)(Encoding(served, path).handle)
    _add_models(app, served)
    _add_control(app, served)
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
        served.asked_for({"model": served.name, **body})
        route: Handler = chat if "messages" in body else completions
        prompts = route.prompts(route.fields.read(body, served.settings.max_logprobs))
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
        return loading.load(body)

    @app.post("/v1/unload_lora_adapter")
    def unload_lora_adapter(body: dict) -> Response:
        return Response(loading.unload(body), media_type="text/plain")


class _Upload(APIRoute):
    """A route for bodies that are files of tensors, before one of the same path for others."""

    def matches(self, scope: Any) -> tuple[Match, Any]:
        return super().matches(scope) if is_upload(scope) else (Match.NONE, {})


def _add_control(app: FastAPI, served: ServedModel) -> None:
    control, loading, routes = served.control, served.loading, cast("Any", app.router)
    allowed: Any = {"dependencies": [Depends(control.refuse_unless_allowed)]}

    @app.post("/pause", **allowed)
    async def pause(
        mode: PauseMode | None = None,
        clear_cache: bool = True,
        wait_for_inflight_requests: bool = False,
    ) -> dict[str, str]:
        mode = mode or ("wait" if wait_for_inflight_requests else "abort")
        await control.pause(mode, reset=clear_cache)
        return {"status": "paused"}

    @app.post("/resume", **allowed)
    async def resume() -> dict[str, str]:
        await control.resume()
        return {"status": "resumed"}

    @app.get("/is_paused", **allowed)
    def is_paused() -> dict[str, bool]:
        return {"is_paused": control.paused}

    @app.post("/reset_prefix_cache", **allowed)
    async def reset_prefix_cache() -> dict[str, bool]:
        return {"success": await control.reset_pages()}

    async def load(request: Request, lora_name: str = "", load_inplace: bool = False) -> Response:
        async with control.upload(request) as file:
            body = {"lora_name": lora_name, "load_inplace": load_inplace}
            return await asyncio.to_thread(loading.load, body, file.read_bytes())

    async def update_weights(request: Request, strict: bool = True) -> dict[str, Any]:
        async with control.upload(request) as file:
            names = await control.update_weights(file, strict=strict)
        return {"message": "Weights updated", **names}

    for path, handler in zip(UPLOADS, (load, update_weights), strict=True):
        routes.add_api_route(
            path, handler, methods=["POST"], route_class_override=_Upload, **allowed
        )

    @app.post("/update_weights", **allowed)
    def refuse_weights() -> None:
        raise RequestError(f"the body is a file of safetensors, with the Content-Type {BINARY}")
