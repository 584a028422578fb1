"""The application: what is answered on each route, and the middlewares around all of them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any, cast

from fastapi import Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict
from starlette.routing import BaseRoute, Match, get_route_path

import lorafx
from lorafx.errors import nearest
from lorafx.integrations.server.admission import BINARY, UPLOADS, Admission, is_upload
from lorafx.integrations.server.anthropic import Messages
from lorafx.integrations.server.control import PauseMode
from lorafx.integrations.server.encoding import Encoding, EncodingFields
from lorafx.integrations.server.errors import (
    OPEN_ROUTES,
    Authentication,
    RequestError,
    answer_errors,
    error_response,
    refusals,
)
from lorafx.integrations.server.generating import GeneratingModel, ServedModel
from lorafx.integrations.server.handlers import Chat, Completions, Handler, Responses
from lorafx.integrations.server.loading import AdapterLoading, LoadFields, UnloadFields
from lorafx.integrations.server.metrics import Metrics
from lorafx.integrations.server.request_log import ENCODING, GENERATING, RequestLog
from lorafx.integrations.server.settings import Settings

#: The errors of routes that run the model, beside those of all routes that take a body.
_RUN = (404, 429, 500, 503)
#: Words of other servers' routes, and those of ours that mean the same.
_MEANT = {"generate": "completions"}
#: Whether a model encodes -> what it does, and what models on other routes do.
_KINDS = {True: ("encodes", "generate"), False: ("generates", "encode (--runner pooling)")}


def build_app(served: ServedModel) -> FastAPI:
    """The application that serves a model by its engine, which has to be running."""
    settings, metrics = served.settings, Metrics(served.compiled, served.engine, served.name)
    always = refusals(401) if settings.api_key else {}
    app = _App(title="lorafx", version=lorafx.__version__, redoc_url=None, responses=always)
    if isinstance(served, GeneratingModel):
        chat, completions = Chat(served), Completions(served)
        messages = Messages(served)
        handlers = chat, completions, Responses(served), messages
        for path, handler in zip(GENERATING, handlers, strict=True):
            described = _described(handler.fields.schema_of_body(), *_RUN)
            app.post(path, name=type(handler).__name__, **described)(handler.handle)
        counted = _described(messages.fields.schema_of_body(), 404)
        app.post(f"{GENERATING[-1]}/count_tokens", name="Count tokens", **counted)(messages.count)
        _add_tokenizer(app, completions, chat)
    else:
        for path in ENCODING:
            described = _described(EncodingFields.schema_of_body(), *_RUN)
            app.post(path, name=path, **described)(Encoding(served, path).handle)
    _add_models(app, served)
    _add_control(app, served)
    _add_loading(app, served.loading)

    @app.get("/version")
    def version() -> dict[str, str]:
        return {"version": lorafx.__version__}

    failing: Any = {"responses": {503: {"description": "The engine answers nothing"}}}

    @app.get("/health", **failing)
    @app.get("/ping", **failing)
    @app.post("/ping", **failing)
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

    @app.exception_handler(404)
    async def refuse_path(request: Request, _: Exception) -> JSONResponse:
        text = _no_route(get_route_path(request.scope), app.routes)
        return error_response(RequestError(text, status=404))

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


class _App(FastAPI):
    """Its description has no answers that FastAPI assumes and this server never gives."""

    def openapi(self) -> dict[str, Any]:
        schema = super().openapi()
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)  # that is a 400
                if path in OPEN_ROUTES:
                    operation["responses"].pop("401", None)
        return schema


def _described(body: dict[str, Any], *statuses: int) -> dict[str, Any]:
    """Arguments for a route that takes a body of this JSON schema."""
    content = {"application/json": {"schema": body}}
    return {
        "responses": refusals(400, 413, *statuses),
        "openapi_extra": {"requestBody": {"content": content}},
    }


def _no_route(path: str, routes: Sequence[BaseRoute]) -> str:
    """Says that there is no route of this path, and which ones are nearest."""
    here = {each.path for each in routes if isinstance(each, APIRoute) and each.include_in_schema}
    words = [_MEANT.get(word, word) for word in _words(path)]
    found: dict[tuple[int, int], list[str]] = {}
    for route in dict.fromkeys((*sorted(here), *GENERATING, *ENCODING)):
        known = _words(route)
        shared = sum(any(a.startswith(b) or b.startswith(a) for a in words) for b in known)
        found.setdefault((shared, -len(known)), []).append(route)
    (shared, _), best = max(found.items())
    near = f"; nearest: {', '.join(best)}" if shared else nearest(path, here)
    if shared and here.isdisjoint(best):
        does, others = _KINDS[ENCODING[0] in here]
        near = f": this server's model {does}, and {', '.join(best)} is of those that {others}"
    return f"there is no route {path!r:.80}{near}; GET /docs lists all"


def _words(path: str) -> list[str]:
    return re.findall("[a-z]{3,}", path.lower())


def _add_models(app: FastAPI, served: ServedModel) -> None:
    @app.get("/v1/models")
    @app.get("/v1/models/", include_in_schema=False)
    def models() -> dict[str, Any]:
        return {"object": "list", "data": served.listed()}

    @app.get("/v1/models/{name:path}", responses=refusals(404))
    def model(name: str) -> dict[str, Any]:
        return served.entry(name)


def _add_tokenizer(app: FastAPI, completions: Completions, chat: Chat) -> None:
    served = completions.served

    def prompt_of(body: dict) -> list[int]:
        served.asked_for({"model": served.name, **body})
        route: Handler = chat if "messages" in body else completions
        prompts = route.prompts(route.read(body))
        if len(prompts) > 1:
            raise RequestError("there is one prompt here, not a list of them", "prompt")
        return prompts[0].ids

    forms = [route.fields.schema_of_body(named=False) for route in (completions, chat)]

    @app.post("/tokenize", **_described({"anyOf": forms}, 404))
    def tokenize(body: dict) -> dict[str, Any]:
        named = body.pop("return_token_strs", False)
        ids = prompt_of(body)
        return {
            "count": len(ids),
            "max_model_len": served.most_tokens,
            "tokens": ids,
            "token_strs": served.tokenizer.convert_ids_to_tokens(ids) if named else None,
        }

    @app.post("/detokenize", responses=refusals(400, 404, 413))
    def detokenize(body: TokenFields) -> dict[str, Any]:
        asked = {**body.model_dump(exclude_none=True), "prompt": body.tokens}
        return {"prompt": served.tokenizer.decode(prompt_of(asked))}


def _add_loading(app: FastAPI, loading: AdapterLoading) -> None:
    # Not coroutines: they read files, and FastAPI runs them in threads.
    refused: Any = {"responses": refusals(400, 403, 404, 413)}

    @app.post("/v1/load_lora_adapter", **refused)
    def load_lora_adapter(body: LoadFields) -> Response:
        return loading.load(body.model_dump())

    @app.post("/v1/unload_lora_adapter", **refused)
    def unload_lora_adapter(body: UnloadFields) -> Response:
        return Response(loading.unload(body.model_dump()), media_type="text/plain")


class TokenFields(BaseModel):
    """The fields of /detokenize, and those that choose an adapter."""

    model_config = ConfigDict(strict=True, extra="allow")

    tokens: list[int]
    model: str | None = None


class _Upload(APIRoute):
    """A route for bodies that are files of tensors, before one of the same path for others."""

    def matches(self, scope: Any) -> tuple[Match, Any]:
        return super().matches(scope) if is_upload(scope) else (Match.NONE, {})


def _add_control(app: FastAPI, served: ServedModel) -> None:
    control, loading, routes = served.control, served.loading, cast("Any", app.router)
    allowed: Any = {"dependencies": [Depends(control.refuse_unless_allowed)]}
    allowed["responses"] = refusals(400, 403, 409, 413, 503)

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
