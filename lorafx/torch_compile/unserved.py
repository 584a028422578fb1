"""Models that torch.compile was given `backend="lorafx"` for, and that there is nothing to do in.

They are compiled by Inductor alone. That is right, and perhaps not what somebody wanted who forgot
`lorafx.attach` or the options: the log says it, once a model.
"""

from __future__ import annotations

import logging
import weakref

from torch import nn

from lorafx.adapter_store.peft_model import peft_layers
from lorafx.passes.attach import MARKS
from lorafx.program.stack import compiled_module
from lorafx.torch_compile.attached import sessions

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
        if not _SEEN_FUNCTION and not sessions():  # one of them may be what it calls
            _SEEN_FUNCTION.append(True)
            _log("a function")
    elif model not in _SEEN:
        _SEEN.add(model)
        if not _has_lora(model):
            _log(type(model).__name__)


def _has_lora(model: nn.Module) -> bool:
    hooks = (hook for module in model.modules() for hook in module._forward_hooks.values())
    return any(isinstance(hook, MARKS) for hook in hooks) or bool(peft_layers(model))


def _log(what: str) -> None:
    _LOG.warning(
        'torch.compile(backend="lorafx") of %s: it carries no LoRA, so it is compiled as it is, by '
        "Inductor unless options say otherwise. lorafx.attach(model, lora_config) it first, or "
        "give options={'lora_config': ...} to torch.compile",
        what,
    )
