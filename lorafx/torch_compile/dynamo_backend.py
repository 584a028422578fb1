"""`torch.compile(model, backend="lorafx")`, found by its entry point.

marked model                  its session's graph, base or LoRA    (attached.py)
options with `lora_config`    marked, and the frame captured again (unmarked.py)
all else, PEFT's layers too   Inductor, which the log says once for each model: the user may have
                              forgotten `lorafx.attach` or the options
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from lorafx.adapter_store.peft_model import peft_layers
from lorafx.capture.executable import refusing
from lorafx.capture.lowering import InductorLowering, Lowering, compile_base, lowering_for
from lorafx.config import Options
from lorafx.errors import CaptureError, LorafxError, ReplacedModuleError
from lorafx.model.marks import MARKS
from lorafx.program.stack import compiled_module
from lorafx.progress import LOG
from lorafx.torch_compile.attached import AttachedSession, attached_sessions, captured_before
from lorafx.torch_compile.unmarked import FrameOptions, mark_captured
from lorafx.torch_internals.compat import mode_settings
from lorafx.torch_internals.entrances import unsupported


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
    try:
        wanted = FrameOptions.of(options)
        patches = mode_settings(mode)
        session = _session_of(examples)
        if session is not None:
            wanted.check(session)
            lowering = lowering_for(session.program.options, patches)
            return session.backend.compile(gm, examples, lowering)
    except ReplacedModuleError:
        raise  # for this one call: the module may be put back
    except Exception as error:
        refusal = error if isinstance(error, LorafxError) else unsupported(error)
        if refusal is None:
            raise
        return refusing(refusal)
    if wanted.asks_for_lora:
        mark_captured(wanted)
    _note_unserved()
    base = compile_base(_lowering(wanted.options, patches), gm, examples)
    return captured_before(base, examples)


def _lowering(options: Options, patches: Mapping[str, Any]) -> Lowering:
    """Of a frame that no session serves: Inductor unless another one was asked for, also where
    the machine lacks the compiler that it needs, which it says itself."""
    return (
        InductorLowering(patches) if options.lowering == "auto" else lowering_for(options, patches)
    )


def _session_of(examples: Sequence[Any]) -> AttachedSession | None:
    """The session whose tensors the frame takes; for a frame that takes none of any, the one
    whose model is running.

    Raises:
        CaptureError: tensors of several models, one of which serves adapters.
    """
    tensors = [example for example in examples if isinstance(example, Tensor)]
    taken = [session for session in attached_sessions() if session.takes(tensors)]
    if len(taken) > 1 and any(session.program.runtime.active for session in taken):
        names = ", ".join(type(session.program.model).__name__ for session in taken)
        raise CaptureError(
            f"one graph holds several models with LoRA ({names}); compile each model separately"
        )
    if taken:
        return taken[0]
    return next((session for session in attached_sessions() if session.running_call()), None)


#: The models that were looked at.
_SEEN: weakref.WeakSet[nn.Module] = weakref.WeakSet()
#: The same for what is compiled and no module, of which nothing can be held.
_SEEN_FUNCTION: list[bool] = []


def _note_unserved() -> None:
    """Log that a frame of the model that is being compiled goes to Inductor as it is, where no
    frame of the model will do anything else."""
    model = compiled_module()
    if model is None:
        if not _SEEN_FUNCTION and not attached_sessions():  # one of them may be what it calls
            _SEEN_FUNCTION.append(True)
            _log("a function", _NO_LORA)
    elif model not in _SEEN:
        _SEEN.add(model)
        if not _is_marked(model):
            _log(type(model).__name__, _PEFT if peft_layers(model) else _NO_LORA)


def _is_marked(model: nn.Module) -> bool:
    hooks = (hook for module in model.modules() for hook in module._forward_hooks.values())
    return any(isinstance(hook, MARKS) for hook in hooks)


_NO_LORA = (
    "it carries no LoRA, so it is compiled as it is, with Inductor unless options say "
    "otherwise. Call lorafx.attach(model, lora_config) first, or give "
    "options={'lora_config': ...} to torch.compile"
)
_PEFT = (
    "PEFT's own layers are compiled as they are, with Inductor unless options say "
    "otherwise. lorafx.attach(model) serves its adapters in mixed batches; compile the "
    "model that it returns"
)


def _log(what: str, text: str) -> None:
    LOG.warning('torch.compile(backend="lorafx") of %s: %s', what, text)
