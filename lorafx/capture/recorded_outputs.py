"""Hidden states and attentions that a model of transformers returns are recorded by hooks, which it
registers in the first call that asks for them, under a lock. Dynamo does not trace that: the graph
would break in the middle of the first such call, and in models that merge images into the text it
would then not be known whose images are whose. So the hooks are registered just before Dynamo
traces the call of a module that is asked to record something.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch._dynamo.variables import nn_module

from lorafx.compat import recorded_outputs


class _Local(threading.local):
    converts = False


_LOCAL = _Local()
_LOCK = threading.Lock()
_WATCHED: list[bool] = []


@contextmanager
def hooks_registered() -> Iterator[None]:
    """Inside, this thread converts a frame of ours: modules that Dynamo traces, and that are asked
    to record outputs, have their hooks."""
    _watch()
    before, _LOCAL.converts = _LOCAL.converts, True
    try:
        yield
    finally:
        _LOCAL.converts = before


def _watch() -> None:
    """Have Dynamo tell of the modules that it is about to trace, from now on."""
    image = nn_module.UnspecializedNNModuleVariable
    with _LOCK:
        if _WATCHED:
            return
        _WATCHED.append(True)
        call = image.call_function

        def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
            if _LOCAL.converts and _records(self.value, kwargs):
                module: Any = sys.modules["transformers.utils.output_capturing"]
                module.maybe_install_capturing_hooks(self.value)
            return call(self, tx, args, kwargs)

        # What others have noted on it stays there.
        call_function.__dict__.update(vars(call))
        setattr(image, "call_function", call_function)  # noqa: B010


def _records(module: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether `module` is asked to record outputs, by these arguments, as Dynamo has them, or by
    its configuration."""
    known: Any = recorded_outputs()
    kinds = None if known is None else known.get(module)
    if not kinds:
        return False
    config = getattr(module, "config", None)
    for name in {"output_attentions", *(f"output_{kind}" for kind in kinds)}:
        given = kwargs.get(name)
        if given is None:
            asked = getattr(config, name, False)
        else:
            asked = given.is_python_constant() and given.as_python_constant()
        if asked:
            return True
    return False
