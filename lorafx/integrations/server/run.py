"""A server from its start to its end: load, warm up, answer, drain."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import uvicorn
from fastapi import FastAPI
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from lorafx.api import compile as compile_model
from lorafx.compiled_model.compiled import CompiledModel
from lorafx.errors import ConfigError
from lorafx.integrations.server.app import build_app
from lorafx.integrations.server.generating import ServedModel
from lorafx.integrations.server.settings import ModelSettings, Settings
from lorafx.progress import progress
from lorafx.runtime.marking import covering


class Opened(NamedTuple):
    """A model in service."""

    app: FastAPI
    compiled: CompiledModel
    engine: Any


def run(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C; then answer what is under way, and return. Raises as `opened`,
    and ConfigError where the address is taken."""
    start = time.perf_counter()
    bound = settings.bind()
    with bound, opened(settings) as server:
        host, port = bound.getsockname()[:2]
        name, count = settings.served_name, len(server.compiled.adapters)
        print(
            f"lorafx: serving {name!r} and {count} adapters on http://{host}:{port}/v1, ready "
            f"after {time.perf_counter() - start:.1f} s",
            flush=True,
        )
        config = uvicorn.Config(
            server.app, log_level="warning", timeout_graceful_shutdown=settings.drain
        )
        with _drained():
            uvicorn.Server(config).run(sockets=[bound])


@contextmanager
def opened(settings: ModelSettings, *, lazily: bool = False) -> Iterator[Opened]:
    """The model of `settings`, loaded, compiled and warmed up, with its application.

    With `lazily` no adapter is loaded. The application answers for all that have a folder; who
    calls it loads the adapter that a request asks for first. Raises ConfigError where the model or
    its tokenizer cannot be loaded or served; otherwise as `lorafx.compile`.
    """
    tokenizer = _tokenizer(settings)
    with progress(f"loading {settings.served_name}"):
        model = _model(settings)
    adapters = {} if lazily else dict(settings.found)
    config = settings.lora_config()
    if lazily and config.target_modules is None:
        config = covering(config, settings.found.values(), model)
    with progress(f"adding {len(adapters)} adapters"):
        compiled = compile_model(model, config, adapters=adapters, options=settings.options())
    engine_config = ContinuousBatchingConfig(
        **settings.engine(model.device.type == "cpu"), per_request_processors=True
    )
    folders = settings if lazily else None
    served = ServedModel(compiled, tokenizer, settings.served_name, folders)
    with compiled.continuous_batching(_generation(settings, model), engine_config) as engine:
        try:
            app = build_app(served, engine, settings.root(), settings.api_key)
            yield Opened(app, compiled, engine)
        finally:
            # Who waited for an answer has it, or has gone.
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


def _generation(settings: ModelSettings, model: Any) -> GenerationConfig:
    """How tokens are chosen where a request does not say."""
    given = model.generation_config
    names = ("eos_token_id", "pad_token_id", "bos_token_id")
    served = GenerationConfig(**{name: getattr(given, name) for name in names})
    served.do_sample = True  # requests choose; temperature 0 takes the likeliest token
    served.temperature, served.top_k, served.top_p = 0.0, 0, 1.0
    if given.do_sample:
        served.temperature, served.top_k = given.temperature or 1.0, given.top_k or 0
        served.top_p = 1.0 if given.top_p is None else given.top_p
    if settings.temperature is not None:
        served.temperature = settings.temperature
    return served


@contextmanager
def _drained() -> Iterator[None]:
    """uvicorn answers what is under way when a signal comes, and then sends itself the signal
    again. Here that has no effect, so that the engine is stopped too."""
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: None) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
