"""A server from its start to its end: load, compile before or beside the answers, drain."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import uvicorn
from fastapi import FastAPI
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from lorafx.api import compile as compile_model
from lorafx.compiled_model.compiled import CompiledModel
from lorafx.errors import ConfigError
from lorafx.generation.continuous.parameters import Sampling
from lorafx.integrations.server.control import Control
from lorafx.integrations.server.encoding import EncoderBatches, Pooling, saved_json
from lorafx.integrations.server.generating import GeneratingModel, ServedModel
from lorafx.integrations.server.routes import build_app
from lorafx.integrations.server.settings import ModelSettings, Settings
from lorafx.progress import progress
from lorafx.runtime.marking import config_covering
from lorafx.torch_internals.response_parser import response_template
from lorafx.torch_internals.transformers_parts import classes_of

#: How many kernels oneDNN keeps, and how many descriptions of them, unless the environment says so.
#: It makes one for each number of rows, of about a megabyte; 1,024 of them is its own default.
_KEPT_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}

#: transformers' kinds of models that generate. A model with images may be of the second only.
_GENERATING = (AutoModelForCausalLM, AutoModelForMultimodalLM)


class Opened(NamedTuple):
    """A model in service."""

    app: FastAPI
    compiled: CompiledModel
    engine: Any
    control: Control


def run(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C, then answer the running requests and return. Raises what
    `opened` raises, and ConfigError if the address is in use."""
    start = time.perf_counter()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("lorafx").setLevel(settings.log_level.upper())
    if torch.distributed.is_torchelastic_launched() and os.environ["WORLD_SIZE"] != "1":
        raise ConfigError(
            "torchrun has started several processes, and lorafx serve is one process on one "
            "device: start it without torchrun; a model that ranks share serves by generate()"
        )
    bound_kernels()
    listener, tls = settings.bind(), settings.tls()
    with listener, opened(settings) as server:
        host, port = listener.getsockname()[:2]
        name, count = settings.served_name, len(server.compiled.adapters)
        ready = (
            f"lorafx: serving {name!r} and {count} adapters on http{'s' if tls else ''}://{host}:"
            f"{port}/v1, ready after {time.perf_counter() - start:.1f} s"
        )
        config = uvicorn.Config(
            server.app,
            # Its lines at level INFO repeat what is said above and in the log of requests.
            log_level="warning" if settings.log_level == "info" else settings.log_level,
            access_log=False,
            timeout_graceful_shutdown=settings.drain,
            **tls,
        )
        serving = _Server(config, server.control)
        with _signals_passed_to(serving):
            listener.listen(config.backlog)  # nobody is refused from the next line on
            print(ready, flush=True)
            serving.run(sockets=[listener])


def bound_kernels() -> None:
    """Bound the memory that oneDNN's kernels take. The first kernel reads the bound."""
    for name, number in _KEPT_KERNELS.items():
        os.environ.setdefault(name, number)


@contextmanager
def opened(settings: ModelSettings, *, lazily: bool = False) -> Iterator[Opened]:
    """The model of `settings`, loaded and ready for requests, with its application.

    With `lazily` no adapter is loaded. The application accepts every adapter that has a folder, and
    its caller first loads the one that a request asks for. Raises ConfigError if the model or its
    tokenizer cannot be loaded or served, and what `lorafx.compile` raises.
    """
    with _readable(settings.model):
        config = AutoConfig.from_pretrained(settings.model)
    tokenizer, kind = _tokenizer(settings, config), _kind(settings, config)
    if kind not in _GENERATING and (settings.shares() or settings.guesses()):
        raise ConfigError(
            "--adapter-weight, --adapter-running, --assistant-model and --prompt-lookup-num-tokens "
            f"are of models that generate, and {settings.served_name} is served as an encoder; "
            "leave them out"
        )
    with progress(f"loading {settings.served_name}"):
        model = _model(settings, kind, settings.model)
    adapters = {} if lazily else dict(settings.found)
    lora = settings.lora_config()
    if lazily and lora.target_modules is None:
        lora = config_covering(lora, settings.found, model)
    with progress(f"adding {len(adapters)} adapters"):
        compiled = compile_model(model, lora, adapters=adapters, options=settings.options())
    serving = _generating if kind in _GENERATING else _encoding
    with serving(compiled, tokenizer, settings, lazily) as served:
        try:
            yield Opened(build_app(served), compiled, served.engine, served.control)
        finally:
            served.control.end()


@contextmanager
def _generating(
    compiled: CompiledModel, tokenizer: Any, settings: ModelSettings, lazily: bool
) -> Iterator[ServedModel]:
    model: Any = compiled._orig_mod
    engine_config = ContinuousBatchingConfig(
        **settings.engine(model.device.type == "cpu"), per_request_processors=True
    )
    defaults, warmup = _defaults(settings, model), settings.warmup or None
    guesses, draft = settings.guesses(), settings.assistant_model
    if draft is not None:
        guesses["assistant_model"] = _model(settings, AutoModelForCausalLM, draft)
    block = compiled.continuous_batching(
        defaults, engine_config, warmup=warmup, tokenizer=tokenizer, **guesses
    )
    with block as engine:
        for name, share in settings.shares().items():  # also of adapters that are loaded later
            engine.set_share(name, share)
        processor = _processor(settings)
        yield GeneratingModel(compiled, engine, tokenizer, settings, lazily, processor)
        # No client is waiting for an answer any more.
        engine.stop(hard_stop=True)


@contextmanager
def _encoding(
    compiled: CompiledModel, tokenizer: Any, settings: ModelSettings, lazily: bool
) -> Iterator[ServedModel]:
    model: Any = compiled._orig_mod
    pooling = None
    classifies = isinstance(model, classes_of(AutoModelForSequenceClassification, model.config))
    if classifies:
        model.config.pad_token_id = tokenizer.pad_token_id  # by which some find the last token
    else:
        causal = any(getattr(module, "is_causal", False) for module in model.modules())
        pooling = Pooling.of(settings, causal)
    batches = EncoderBatches(compiled, pooling, settings, tokenizer.pad_token_id or 0)
    if settings.warmup:
        tokens = torch.ones(2, 8, dtype=torch.long, device=model.device)
        compiled.warmup({"input_ids": tokens, "attention_mask": tokens})
    saved = saved_json(settings.model, "sentence_bert_config.json") or {}
    # RoBERTa's positions begin behind the index of the padding.
    positions = int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0)
    tables = (module for module in model.modules() if isinstance(module, torch.nn.Embedding))
    padded = [t.padding_idx for t in tables if t.num_embeddings == positions]
    behind = [positions - index - 1 for index in padded if index is not None]
    limits = saved.get("max_seq_length"), tokenizer.model_max_length, *behind
    yield ServedModel(compiled, batches, tokenizer, settings, lazily, limits)


def _tokenizer(settings: ModelSettings, config: Any) -> PreTrainedTokenizerFast:
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(settings.model)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(
            f"{settings.model} has no tokenizer that can be read ({why:.160}); "
            "save it beside the model: AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)"
        ) from error
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and (settings.max_model_len or 0) > positions:
        raise ConfigError(
            f"--max-model-len {settings.max_model_len} is more than the {positions} positions of "
            f"{settings.model}; leave it out to have them all"
        )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(
            f"the tokenizer of {settings.model} is a {type(tokenizer).__name__}, which cannot "
            "decode a stream of tokens; the server needs one with a tokenizer.json"
        )
    response_template(tokenizer)
    if settings.chat_template is not None:
        tokenizer.chat_template = _template(settings.chat_template)
    return tokenizer


def _processor(settings: ModelSettings) -> Any:
    """The model's processor of images or sounds, if it has files of one."""
    files = ("processor_config.json", "preprocessor_config.json")
    if all(saved_json(settings.model, file) is None for file in files):
        return None
    with _readable(settings.model):
        return AutoProcessor.from_pretrained(settings.model)


def _template(given: str) -> str:
    """The chat template in a file, or itself in one line. Raises ConfigError if it is neither."""
    if "{{" in given or "{%" in given:
        return given
    try:
        return Path(given).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--chat-template {given}: neither a file with a template nor a template ({error})"
        ) from error


def _kind(settings: ModelSettings, config: Any) -> Any:
    """transformers' class of models to load: that generate, that classify, or trunks."""
    saved = [getattr(transformers, name, None) for name in config.architectures or ()]

    def is_saved(kind: Any) -> bool:
        return any(cls in saved for cls in classes_of(kind, config))

    encodes = saved_json(settings.model, "modules.json") is not None
    encodes = encodes or any(map(is_saved, (AutoModel, AutoModelForMaskedLM)))
    classifies = is_saved(AutoModelForSequenceClassification)
    if settings.runner == "generate" or (settings.runner == "auto" and not encodes | classifies):
        return next((k for k in _GENERATING if classes_of(k, config)), AutoModelForCausalLM)
    return AutoModelForSequenceClassification if classifies else AutoModel


def _model(settings: ModelSettings, kind: Any, name: str) -> Any:
    dtype = "auto" if settings.dtype is None else getattr(torch, settings.dtype, None)
    if dtype != "auto" and not isinstance(dtype, torch.dtype):
        raise ConfigError(f"--dtype {settings.dtype}: torch has no dtype of this name")
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _readable(name):
        model = kind.from_pretrained(name, dtype=dtype, attn_implementation="sdpa")
    return model.to(device).eval().requires_grad_(False)


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
    for name in Sampling._fields:
        setattr(config, name, getattr(saved, name) if saved.do_sample else None)
    if settings.temperature is not None or not saved.do_sample:
        config.temperature = settings.temperature or 0.0
    return config


class _Server(uvicorn.Server):
    """Has a paused engine go on when it is stopped, since it waits for all answers."""

    def __init__(self, config: uvicorn.Config, control: Control) -> None:
        super().__init__(config)
        self._control = control

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._control.resume()
        await super().shutdown(sockets)


@contextmanager
def _signals_passed_to(server: uvicorn.Server) -> Iterator[None]:
    """Have SIGTERM and SIGINT end the server, also before it has handlers of its own. After the
    running requests it raises the signal again, which would keep the engine from being stopped."""
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, server.handle_exit) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
