"""A server from its start to its end: load, compile before or beside the answers, drain."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import uvicorn
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.cli.serving.server import build_server
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from lorafx.adapter_store.names import BASE
from lorafx.api import compile as compile_model
from lorafx.compiled_model.compiled import CompiledModel
from lorafx.errors import ConfigError, LorafxError, nearest
from lorafx.generation.continuous.manager import AdapterBatchingManager
from lorafx.integrations.server.errors import (
    Authentication,
    RequestError,
    answer_errors,
    message_of,
)
from lorafx.integrations.server.generating import Generation, Metrics, ServedModel
from lorafx.integrations.server.handlers import Chat, Completions, Responses
from lorafx.integrations.server.settings import UNPRINTABLE, ModelSettings, Settings
from lorafx.progress import progress
from lorafx.runtime.marking import config_covering


class Opened(NamedTuple):
    """A model in service."""

    app: FastAPI
    compiled: CompiledModel
    engine: Any


def run(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C, then answer the running requests and return. Raises what
    `opened` raises, and ConfigError if the address is in use."""
    start = time.perf_counter()
    listener = settings.bind()
    with listener, opened(settings) as server:
        host, port = listener.getsockname()[:2]
        name, count = settings.served_name, len(server.compiled.adapters)
        print(
            f"lorafx: serving {name!r} and {count} adapters on http://{host}:{port}/v1, ready "
            f"after {time.perf_counter() - start:.1f} s",
            flush=True,
        )
        config = uvicorn.Config(
            server.app, log_level="warning", timeout_graceful_shutdown=settings.drain
        )
        with _signals_ignored():
            uvicorn.Server(config).run(sockets=[listener])


@contextmanager
def opened(settings: ModelSettings, *, lazily: bool = False) -> Iterator[Opened]:
    """The model of `settings`, loaded and ready for requests, with its application.

    With `lazily` no adapter is loaded. The application accepts every adapter that has a folder, and
    its caller first loads the one that a request asks for. Raises ConfigError if the model or its
    tokenizer cannot be loaded or served, and what `lorafx.compile` raises.
    """
    tokenizer = _tokenizer(settings)
    with progress(f"loading {settings.served_name}"):
        model = _model(settings)
    adapters = {} if lazily else dict(settings.found)
    config = settings.lora_config()
    if lazily and config.target_modules is None:
        config = config_covering(config, settings.found.values(), model)
    with progress(f"adding {len(adapters)} adapters"):
        compiled = compile_model(model, config, adapters=adapters, options=settings.options())
    engine_config = ContinuousBatchingConfig(
        **settings.engine(model.device.type == "cpu"), per_request_processors=True
    )
    folders = settings if lazily else None
    served = ServedModel(compiled, tokenizer, settings.served_name, folders)
    defaults, warmup = _defaults(settings, model), settings.warmup or None
    with compiled.continuous_batching(defaults, engine_config, warmup=warmup) as engine:
        try:
            app = build_app(served, engine, settings.root(), settings.api_key)
            yield Opened(app, compiled, engine)
        finally:
            # No client is waiting for an answer any more.
            engine.stop(hard_stop=True)


def _tokenizer(settings: ModelSettings) -> PreTrainedTokenizerFast:
    with _readable(settings.model):
        AutoConfig.from_pretrained(settings.model)
        tokenizer: Any = AutoTokenizer.from_pretrained(settings.model)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(
            f"the tokenizer of {settings.model} is a {type(tokenizer).__name__}, which cannot "
            "decode a stream of tokens; the server needs one with a tokenizer.json"
        )
    return tokenizer


def _model(settings: ModelSettings) -> Any:
    dtype = "auto" if settings.dtype is None else getattr(torch, settings.dtype, None)
    if dtype != "auto" and not isinstance(dtype, torch.dtype):
        raise ConfigError(f"--dtype {settings.dtype}: torch has no dtype of this name")
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _readable(settings.model):
        model = AutoModelForCausalLM.from_pretrained(
            settings.model, dtype=dtype, attn_implementation="sdpa"
        )
    moved: Any = model
    return moved.to(device).eval().requires_grad_(False)


@contextmanager
def _readable(model: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise ConfigError(f"{model} cannot be loaded: {error}") from error


def _defaults(settings: ModelSettings, model: Any) -> GenerationConfig:
    """How tokens are chosen unless a request says otherwise."""
    saved = model.generation_config
    names = ("eos_token_id", "pad_token_id", "bos_token_id")
    config = GenerationConfig(**{name: getattr(saved, name) for name in names})
    config.do_sample = True  # requests choose; temperature 0 takes the likeliest token
    config.temperature, config.top_k, config.top_p = 0.0, 0, 1.0
    if saved.do_sample:
        config.temperature, config.top_k = saved.temperature or 1.0, saved.top_k or 0
        config.top_p = 1.0 if saved.top_p is None else saved.top_p
    if settings.temperature is not None:
        config.temperature = settings.temperature
    return config


@contextmanager
def _signals_ignored() -> Iterator[None]:
    """Ignore SIGTERM and SIGINT. uvicorn's own handlers end `run` after the running requests, and
    then it raises the signal again, which would keep the engine from being stopped."""
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: None) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


#: transformers' routes that are kept. The others load any model, or unload this one.
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models")


def build_app(
    served: ServedModel,
    engine: AdapterBatchingManager,
    adapter_root: Path | None = None,
    api_key: str | None = None,
) -> FastAPI:
    """The application that serves a model by its engine, which has to be running. Clients may load
    adapters from `adapter_root`, and have to send `api_key`, if there is one, except to /health and
    /metrics."""
    metrics = Metrics(served.compiled, engine.health)
    generation = Generation(served, engine, metrics)
    absent: Any = None  # in place of handlers of routes that are removed
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
        compiling = served.compiled.status().progress
        return JSONResponse({"status": "ok", **({"graphs": compiling} if compiling else {})})

    @app.get("/metrics")
    def counts() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


class AdapterLoading:
    """Serves /v1/load_lora_adapter and /v1/unload_lora_adapter. Adapters are in the folder `root`;
    if that is None, all requests are refused."""

    def __init__(self, compiled: CompiledModel, root: Path | None) -> None:
        self._compiled = compiled
        self._root = None if root is None else root.resolve()

    def load(self, body: dict[str, Any]) -> str:
        """Load the adapter in folder `lora_path` as `lora_name`; returns the answer. Raises
        RequestError if that is refused."""
        root = self._root_or_refuse()
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
        folder = _folder_inside(root, path)
        try:
            self._compiled.load_adapter(folder, name)
        except LorafxError as error:
            raise RequestError(message_of(error), "lora_path") from error
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body: dict[str, Any]) -> str:
        """Unload `lora_name`; returns the answer. Its running requests are answered to the end.
        Raises RequestError if there is no such adapter."""
        self._root_or_refuse()
        name, loaded = _text(body, "lora_name"), self._compiled.adapters
        if name not in loaded:
            raise RequestError(f"no adapter {name!r} is loaded{nearest(name, loaded)}", status=404)
        self._compiled.unload_adapter(name)
        return f"Success: LoRA adapter '{name}' removed successfully."

    def _root_or_refuse(self) -> Path:
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


def _folder_inside(root: Path, path: str) -> Path:
    """The folder `path`, relative to `root`. Raises RequestError unless it and its files are in
    `root` after all links have been followed; the error does not tell what is elsewhere."""
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
