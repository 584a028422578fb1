"""Models that are marked when torch.compile captures them.

    torch.compile(model, backend="lorafx", options={"lora_config": ..., "adapters": {...}})

The first frame that reaches the backend identifies the model. Its modules are matched by class
hierarchy and marked as `lorafx.attach` marks them, and Dynamo traces the frame again, now with the
marks. The model is found in one of two ways. torch.compile was applied to what is on the Python
stack right below Dynamo's outermost wrapper; a compiled forward that is called directly, or another
function, has the module among its own variables. When Dynamo uses the graph of another model of the
same class, the model is found in the first way when the graph runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from lorafx.adapter_store.peft_model import is_peft_model, peft_layers
from lorafx.config import Options
from lorafx.errors import CaptureError, ConfigError, nearest
from lorafx.pass_order import pipeline
from lorafx.program.stack import compiled_module, unwrapped
from lorafx.torch_compile.attach_model import AttachedBackend, attach, refuse_options
from lorafx.torch_compile.attached import AttachedSession, marked_session, session_of
from lorafx.torch_compile.pending import pending_blocks
from lorafx.torch_internals.fake_tensors import unset_fake_temporarily
from lorafx.torch_internals.frames import capture_again, captured_locals

_LORA = ("lora_config", "adapters")


@dataclass(frozen=True)
class FrameOptions:
    """The `options` of torch.compile: lorafx's own, and those that say how to mark an unmarked
    model.

    Attributes:
        given: all of them, as they were given.
        options: the fields of `Options` among them.
    """

    given: Mapping[str, Any]
    options: Options

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> FrameOptions:
        """`given`, checked.

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
        own = {key: value for key, value in (given or {}).items() if key not in _LORA}
        options = Options.of(own)
        pipeline(options)  # its names are right
        refuse_options(options)
        return cls(dict(given or {}), options)

    @property
    def asks_for_lora(self) -> bool:
        return any(self.given.get(name) is not None for name in _LORA)

    def check(self, session: AttachedSession) -> None:
        """Check that these options are those that the model was marked with, or none.

        Raises:
            ConfigError: they are not.
        """
        if not self.given or self.given == session.given:
            return
        if self.asks_for_lora:
            raise ConfigError(
                "the model carries LoRA already, from lorafx.attach or from an earlier "
                "torch.compile with other options; leave out lora_config and adapters, or "
                "call lorafx.detach() first"
            )
        for name, value in self.given.items():
            own = getattr(session.program.options, name)
            if value != own:
                raise ConfigError(
                    f"torch.compile was given the option {name}={value!r}, but the model "
                    f"was attached with {name}={own!r}; give options to lorafx.attach"
                )


def mark_captured(wanted: FrameOptions) -> None:
    """Mark the model whose frame is being captured, and have the frame captured again.

    Nothing happens where the model is marked: the frame takes nothing of it.

    Raises:
        CaptureError: the model is not known.
        As `lorafx.attach`, and for the blocks around the call as `lorafx.adapters`; the model is
        as it was then.
    """
    model = compiled_module() or _only_module()
    if model is None:
        raise CaptureError(
            "options={'lora_config': ...} do not say which model they are for: the "
            "compiled function calls several models or none; call lorafx.attach(model, "
            "lora_config) instead"
        )
    if session_of(model) is None:
        _mark(model, wanted)
        capture_again("LoRA was attached to the model")


def _only_module() -> nn.Module | None:
    """The module among the local variables of the captured function that holds all others."""
    found = [unwrapped(v) for v in captured_locals().values() if isinstance(v, nn.Module)]
    for module in found:
        inside = {id(part) for part in module.modules()}
        if all(id(other) in inside for other in found):
            return module
    return None


def _mark(model: nn.Module, wanted: FrameOptions) -> AttachedSession:
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
        _without_compiled_calls(model),
    ):
        attach(
            model,
            wanted.given.get("lora_config"),
            adapters=wanted.given.get("adapters"),
            options=wanted.options,
        )
    session = marked_session(model)
    session.given = wanted.given
    backend = session.backend
    assert isinstance(backend, AttachedBackend)
    backend.adopt = lambda: _adopt(wanted)
    try:
        for block in pending_blocks(model):
            block.begin(session.block(block.names, block.tracking))
    except BaseException:
        session.close()
        raise
    return session


@contextmanager
def _without_compiled_calls(model: nn.Module) -> Iterator[None]:
    """Put aside what `model.compile(...)` or `model.forward = torch.compile(model.forward, ...)`
    left on the model. `attach` refuses models with graphs that do not know of LoRA; these are being
    captured right now, and again with the marks."""
    own, call = vars(model), model._compiled_call_impl
    forward = own.get("forward")
    compiled = hasattr(forward, "_torchdynamo_orig_callable")
    model._compiled_call_impl = None
    if compiled:
        del own["forward"]
    try:
        yield
    finally:
        model._compiled_call_impl = call
        if compiled:
            own["forward"] = forward


def _adopt(wanted: FrameOptions) -> AttachedSession | None:
    model = compiled_module()
    if model is None or session_of(model) is not None:
        return None
    return _mark(model, wanted)
