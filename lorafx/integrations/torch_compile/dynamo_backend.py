"""The backend of `torch.compile(model, backend="lorafx")`, found by its entry point. It compiles

an attached model             outside of blocks only, where it is the base model
options with `lora_config`    the model's first frame attaches LoRA
anything else                 by Inductor, PEFT's layers too
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import fx, nn

from lorafx.adapter_store.peft_model import is_peft_model, peft_layers
from lorafx.capture.executable import refusing
from lorafx.capture.lowering import InductorLowering, compile_base, lowering_for
from lorafx.compiled_model.compiled import (
    attached_models,
    compiled_of,
)
from lorafx.config import Options
from lorafx.errors import CaptureError, ConfigError, LorafxError, nearest
from lorafx.integrations.torch_compile.attached import RUNNING, FirstCall, attach
from lorafx.pass_order import pipeline
from lorafx.program.stack import compiled_module
from lorafx.runtime.requests import IN_BLOCKS
from lorafx.runtime.resting import adapters_in_use
from lorafx.torch_internals.compat import mode_settings
from lorafx.torch_internals.frames import capture_again
from lorafx.torch_internals.graph_parts import unset_fake_temporarily
from lorafx.torch_internals.versions import unsupported

#: Options of torch.compile that are arguments of `attach`, not fields of `Options`.
_ATTACH_OPTIONS = ("lora_config", "adapters")


def compile_frame(
    gm: fx.GraphModule,
    examples: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend `lorafx`: compile one frame that Dynamo captured.

    Args:
        gm: the graph, one placeholder for each of `examples`.
        examples: the inputs of the frame: tensors and sizes.
        mode: a mode of torch.compile, passed to Inductor.
        options: fields of `Options`; `lora_config` and `adapters` as for `lorafx.attach`, for a
            model that is not marked.

    Raises:
        LorafxError: the model cannot be marked as the options ask. The executable raises every
            other failure to compile when it is called, so that Dynamo does not wrap the error.
    """
    running = RUNNING.get()
    model = compiled_module() if running is None else running.model
    try:
        settings = _settings_of(options)
        patches = mode_settings(mode)
        compiled = None if model is None else compiled_of(model)
        if compiled is not None and not options:
            settings = compiled._session.program.options
    except Exception as error:
        refusal = error if isinstance(error, LorafxError) else unsupported(error)
        if refusal is None:
            raise
        return refusing(refusal)
    options = options or {}
    if compiled is None and any(options.get(name) is not None for name in _ATTACH_OPTIONS):
        _attach_at_first_frame(model, options, settings)
        if running is not None:
            raise CaptureError("LoRA was attached to the model, which serves this call")
        capture_again("LoRA was attached to the model")
    # Not `lowering_for` for "auto": Inductor itself reports that the machine lacks a compiler.
    auto = settings.lowering == "auto"
    lowering = InductorLowering(patches) if auto else lowering_for(settings, patches)
    return _refusing_adapters(compile_base(lowering, gm, examples), examples)


def _settings_of(options: Mapping[str, Any] | None) -> Options:
    """The fields of `Options` among the `options` of torch.compile. Raises ConfigError if an option
    is unknown, or has a value that it cannot have."""
    known = [*_ATTACH_OPTIONS, *(item.name for item in fields(Options))]
    for key in options or {}:
        if key not in known:
            raise ConfigError(
                f"unknown option {key!r}{nearest(key, known)}; options of "
                f'torch.compile(backend="lorafx") are {", ".join(known)}'
            )
    settings = Options.of({k: v for k, v in (options or {}).items() if k not in _ATTACH_OPTIONS})
    pipeline(settings)  # raises for names of passes that there are not
    return settings


def _attach_at_first_frame(
    model: nn.Module | None, options: Mapping[str, Any], settings: Options
) -> None:
    """Attach LoRA to the model whose first frame is being captured. Raises CaptureError if the
    model is not known, and what `lorafx.attach` raises."""
    if model is None:
        raise CaptureError(
            "options={'lora_config': ...} do not say which model they are for: a function was "
            "compiled, which calls several models or none; call lorafx.attach(model, "
            "lora_config) instead"
        )
    if is_peft_model(model) or peft_layers(model):
        raise ConfigError(
            f"this {type(model).__name__} has its own adapters, which PEFT has put into it: "
            "lorafx.attach(model) serves them. Otherwise leave out lora_config and "
            "adapters, or pass the base model without PEFT's adapters"
        )
    # Banks outlive this call, so they must not be made in its inference mode or with its fakes.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        unset_fake_temporarily(),
        _compiled_calls_hidden(model),
    ):
        config, adapters = (options.get(name) for name in _ATTACH_OPTIONS)
        attach(model, config, adapters=adapters, options=settings)


@contextmanager
def _compiled_calls_hidden(model: nn.Module) -> Iterator[None]:
    """Hide what `model.compile(...)` or `model.forward = torch.compile(model.forward, ...)` left on
    the model: `attach` refuses a model with compiled graphs, but these are captured again."""
    call, model._compiled_call_impl = model._compiled_call_impl, None
    hidden = FirstCall(model)
    if not isinstance(vars(model).get("forward"), FirstCall):
        hidden.put_in_place()
    try:
        yield
    finally:
        hidden.put_back()
        model._compiled_call_impl = call


def _refusing_adapters(base: Callable[..., Any], examples: Sequence[Any]) -> Callable[..., Any]:
    """The graph `base`, which has no LoRA. It raises CaptureError in a block whose adapters change
    a weight among its inputs: it is of a part of an attached model, or older than its marks."""
    weights = [
        position
        for position, example in enumerate(examples)
        if isinstance(example, nn.Parameter) and example.dim() > 1
    ]
    if not weights:
        return base

    def run(*arguments: Any) -> Any:
        for compiled in attached_models(IN_BLOCKS.get()):
            program, session = compiled._session.program, compiled._session
            touched = {
                path for name in adapters_in_use(session) for path in session.store[name].sites
            }
            sites = (program.site_of_weight(arguments[position]) for position in weights)
            if any(site is not None and site.path in touched for site in sites):
                raise CaptureError(
                    f"this graph has no LoRA: it is of a part of this "
                    f"{type(compiled._orig_mod).__name__}, or was captured before LoRA was "
                    "attached. Call the model that lorafx.attach returned; torch._dynamo.reset() "
                    "drops earlier graphs"
                )
        return base(*arguments)

    return run
