"""A loop over a slice of all layers is traced as a loop over the layers.

    for layer in self.layers[: self.config.num_hidden_layers]:

makes another ModuleList. Dynamo traces how, which is an eighth of the instructions of a step of a
Llama, and the loop then takes the same modules from it by the same names.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import nn
from torch._dynamo.variables import nn_module
from torch._dynamo.variables.builtin import BuiltinVariable
from torch._dynamo.variables.lists import SliceVariable

from lorafx.capture.interception import Interception

#: What a list of another class may have of its own.
_METHODS = ("__getitem__", "__iter__", "__len__")


def _call_function(call: Any, image: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    if image.fn is operator.getitem and len(args) == 2 and _looped_over(tx):
        items, which = (arg.realize() for arg in args)
        if isinstance(which, SliceVariable) and _all(tx, items, which):
            return items
    return call(image, tx, args, kwargs)


def _looped_over(tx: Any) -> bool:
    """Whether nothing but a loop gets the result of the instruction that runs."""
    following = tx.instruction_pointer
    return following is not None and tx.instructions[following].opname == "GET_ITER"


def _all(tx: Any, items: Any, which: Any) -> bool:
    """Whether `items` are the modules of a list as it was before the frame, and `which` all of
    them in their order."""
    if not isinstance(items, nn_module.UnspecializedNNModuleVariable):
        return False
    modules: Any = items.value
    if not isinstance(modules, nn.ModuleList):
        return False
    kind: Any = type(modules)
    if any(getattr(kind, name) is not getattr(nn.ModuleList, name) for name in _METHODS):
        return False
    effects = tx.output.side_effects
    known = effects.id_to_variable.get(id(modules._modules))
    if known is not None and effects.is_modified(known):
        return False
    if not all(bound.is_python_constant() for bound in which.items):
        return False
    places = range(len(modules))
    return places[which.as_python_constant()] == places


_CALLS = Interception(BuiltinVariable, "call_function", _call_function)

#: Inside, this thread converts a frame of ours.
whole_slices = _CALLS.on
