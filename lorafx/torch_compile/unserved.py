"""Models that are compiled with `backend="lorafx"` but carry no mark of lorafx.

Inductor alone compiles them. That is correct, even for a model with PEFT's layers, where PEFT's
switches still decide what runs. But the user may have forgotten `lorafx.attach` or the options, so
the log says so, once per model.
"""

from __future__ import annotations

import logging
import weakref

from torch import nn

from lorafx.adapter_store.peft_model import peft_layers
from lorafx.model.attachment import MARKS
from lorafx.program.stack import compiled_module
from lorafx.torch_compile.attached import attached_sessions

_LOG = logging.getLogger("lorafx")
#: The models that were looked at.
_SEEN: weakref.WeakSet[nn.Module] = weakref.WeakSet()
#: The same for what is compiled and no module, of which nothing can be held.
_SEEN_FUNCTION: list[bool] = []


def note_unserved() -> None:
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
    _LOG.warning('torch.compile(backend="lorafx") of %s: %s', what, text)
