"""Hidden states and attentions that a model of transformers returns are recorded by hooks, which it
registers in the first call that asks for them, under a lock. Dynamo does not trace that: the graph
would break in the middle of the first such call, and in models that merge images into the text it
would then not be known whose images are whose. So the hooks are registered just before Dynamo
traces the call of a module that is asked to record something.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from lorafx.torch_internals.compat import recorded_outputs
from lorafx.torch_internals.entries import Required, private_names
from lorafx.torch_internals.interception import Interception

ENTRY = Required(
    use="hooks that record hidden states are registered before Dynamo traces the module",
    ended_by="transformers registers them when a model is made, or a lock that Dynamo traces",
)

with private_names():
    from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable


def _call_function(call: Any, image: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    if _records(image.value, kwargs):
        module: Any = sys.modules["transformers.utils.output_capturing"]
        module.maybe_install_capturing_hooks(image.value)
    return call(image, tx, args, kwargs)


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


_CALLS = Interception(UnspecializedNNModuleVariable, "call_function", _call_function)

#: Inside, this thread converts a frame of ours: modules that Dynamo traces, and that are asked to
#: record outputs, have their hooks.
hooks_registered = _CALLS.on
