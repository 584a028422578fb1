"""`torch.compile(model, backend="lorafx")`, found by its entry point.

an attached model             is served without a backend inside of blocks (attached.py), and is the
                              base model elsewhere
options with `lora_config`    LoRA is attached at the model's first frame
all else, PEFT's layers too   Inductor
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
from lorafx.compiled_model.compiled import attached_models, compiled_of
from lorafx.config import Options
from lorafx.errors import CaptureError, ConfigError, LorafxError, nearest
from lorafx.integrations.torch_compile.attached import RUNNING, FirstCall, attach
from lorafx.pass_order import pipeline
from lorafx.program.stack import compiled_module
from lorafx.runtime.requests import IN_BLOCKS
from lorafx.runtime.session import wanted
from lorafx.torch_internals.compat import mode_settings
from lorafx.torch_internals.entrances import unsupported
from lorafx.torch_internals.frames import capture_again
from lorafx.torch_internals.graph_parts import unset_fake_temporarily

_LORA = ("lora_config", "adapters")


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
        LorafxError: the model cannot be marked as the options ask. Every other failure to compile
            is raised when the executable is called, so that the caller gets the error itself and
            not one of Dynamo's around it.
    """
    running = RUNNING.get()
    model = compiled_module() if running is None else running.model
    try:
        settings = _options_of(options)
        patches = mode_settings(mode)
        compiled = None if model is None else compiled_of(model)
        if compiled is not None and not options:
            settings = compiled._session.program.options
    except Exception as error:
        refusal = error if isinstance(error, LorafxError) else unsupported(error)
        if refusal is None:
            raise
        return refusing(refusal)
    given = options or {}
    if compiled is None and any(given.get(name) is not None for name in _LORA):
        _attach(model, given, settings)
        if running is not None:
            raise CaptureError("LoRA was attached to the model, which serves this call")
        capture_again("LoRA was attached to the model")
    # Inductor says itself where the machine lacks the compiler that it needs.
    auto = settings.lowering == "auto"
    lowering = InductorLowering(patches) if auto else lowering_for(settings, patches)
    return _without_lora(compile_base(lowering, gm, examples), examples)


def _options_of(given: Mapping[str, Any] | None) -> Options:
    """The fields of `Options` among the `options` of torch.compile.

    Raises:
        ConfigError: an unknown option, or a value that an option cannot have.
    """
    known = [*_LORA, *(item.name for item in fields(Options))]
    for key in given or {}:
        if key not in known:
            raise ConfigError(
                f"unknown option {key!r}{nearest(key, known)}; options of "
                f'torch.compile(backend="lorafx") are {", ".join(known)}'
            )
    options = Options.of({key: value for key, value in (given or {}).items() if key not in _LORA})
    pipeline(options)  # its names are right
    return options


def _attach(model: nn.Module | None, given: Mapping[str, Any], options: Options) -> None:
    """Attach LoRA to the model whose first frame is being captured.

    Raises:
        CaptureError: the model is not known.
        As `lorafx.attach`; the model is as it was then.
    """
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
    # Banks outlive the call that happens to be the first one, whatever mode that runs in.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        unset_fake_temporarily(),
        _compiled_calls_hidden(model),
    ):
        attach(model, given.get("lora_config"), adapters=given.get("adapters"), options=options)


@contextmanager
def _compiled_calls_hidden(model: nn.Module) -> Iterator[None]:
    """Hide what `model.compile(...)` or `model.forward = torch.compile(model.forward, ...)` left on
    the model: `attach` refuses graphs that do not know of LoRA, and these are captured anew."""
    call, model._compiled_call_impl = model._compiled_call_impl, None
    hidden = FirstCall(model)
    if not isinstance(vars(model).get("forward"), FirstCall):
        hidden.put_in_place()
    try:
        yield
    finally:
        hidden.put_back()
        model._compiled_call_impl = call


def _without_lora(base: Callable[..., Any], examples: Sequence[Any]) -> Callable[..., Any]:
    """The graph, which refuses to run in a block whose adapters change a weight that it takes: it
    is of a part of an attached model, or was captured before LoRA was attached."""
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
            touched = {path for name in wanted(session) for path in session.store[name].sites}
            found = (program.site_of_weight(arguments[position]) for position in weights)
            if any(site is not None and site.path in touched for site in found):
                raise CaptureError(
                    f"this graph has no LoRA: it is of a part of this "
                    f"{type(compiled.model).__name__}, or was captured before LoRA was attached. "
                    "Call the model that lorafx.attach returned; torch._dynamo.reset() drops "
                    "earlier graphs"
                )
        return base(*arguments)

    return run
