"""A PeftModel whose base model lorafx serves: using it raises an error that says so.

Without its wrappers it would compute the base model, switch adapters that are not there, and save
none. So the methods that it has from PEFT's classes, and those of its tuner, are shadowed on the
objects by one that raises; classes, attributes and the methods of `nn.Module` stay. Its state dict
would lack the adapters, so it raises too.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import FunctionType
from typing import Any, NoReturn

from torch import nn

from lorafx.errors import CaptureError

#: Methods of `nn.Module` itself that would answer without the adapters.
_OF_MODULES = ("forward", "state_dict", "load_state_dict")
#: Methods of PEFT's classes that answer rightly, and what the end of a block of `disable_adapter`
#: calls, in which the model may have been handed over.
_HARMLESS = ("get_base_model", "enable_adapter_layers")


def hand_over(peft_model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Make the methods of a PeftModel and of its tuner raise; what `give_back` takes."""
    hidden: list[tuple[nn.Module, str]] = []
    owner = type(peft_model).__name__
    for part in (peft_model, peft_model.base_model):
        assert isinstance(part, nn.Module)
        for name in _methods(type(part)):
            if name not in vars(part):
                vars(part)[name] = partial(_refuse, owner, name)
                hidden.append((part, name))
    return hidden


def without_wrappers(model: nn.Module) -> nn.Module:
    """The base model of a PeftModel that was handed over; any other model is returned."""
    if not isinstance(model, nn.Module):  # of whoever calls it with something else
        return model
    forward = vars(model).get("forward")
    if not isinstance(forward, partial) or forward.func is not _refuse:
        return model
    base: Any = model
    found = base.get_base_model()
    assert isinstance(found, nn.Module)
    return found


def give_back(hidden: list[tuple[nn.Module, str]]) -> None:
    """Show the methods again."""
    for part, name in hidden:
        del vars(part)[name]
    hidden.clear()


def _methods(cls: type) -> Iterator[str]:
    yield from _OF_MODULES
    own = [base for base in cls.__mro__ if base not in nn.Module.__mro__]
    named = {name: value for base in own for name, value in vars(base).items()}
    for name, value in named.items():
        public = not name.startswith("_") and name not in _HARMLESS
        if public and isinstance(value, FunctionType) and not hasattr(nn.Module, name):
            yield name


def _refuse(owner: str, name: str, *_: Any, **__: Any) -> NoReturn:
    raise CaptureError(
        f"{owner}.{name}: lorafx took over the adapters of this {owner}, so it has none "
        "now. Use the model that lorafx.compile (or attach) returned, or detach() that "
        "model first, which gives the adapters back"
    )
