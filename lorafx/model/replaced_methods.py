"""Replacing methods of modules, such as forwards by compiled ones, while the model runs."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Sequence
from operator import itemgetter
from types import MethodType
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")

#: A module, the name of an attribute, and the value that replaces it.
Replacement = tuple[nn.Module, str, Callable[..., Any]]
#: The attributes of a module, the name of one, its value before (None if it was not set), and a
#: number: of several replacements of one attribute the first has the least.
_Original = tuple[dict[str, Any], str, Any, int]
_NUMBERS = itertools.count()


class ReplacedMethod:
    """Replaces a method of a module from `put_in_place` to `put_back`. Copies and pickles of the
    module have the original method."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name
        self.original: Callable[..., Any] = getattr(model, name)
        self._before = vars(model).get(name)
        functools.update_wrapper(self, self.original, updated=())  # for the signature

    def put_in_place(self) -> None:
        vars(self.model)[self.name] = self

    def put_back(self) -> None:
        """Restore the method, unless something else has replaced this since."""
        if vars(self.model).get(self.name) is self:
            _restore([(vars(self.model), self.name, self._before, 0)])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    @property
    def __code__(self) -> Any:
        return self.original.__code__  # which torch.export reads

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _identity, (self.original,)


def _identity(method: Callable[..., Any]) -> Callable[..., Any]:
    return method


class Replacements:
    """The attributes that `replacing` has replaced and not yet restored."""

    def __init__(self) -> None:
        self._originals: Sequence[_Original] = ()
        _ALL.add(self)

    def replacing(
        self, attributes: Sequence[Replacement], action: Callable[..., T], *args: Any, **kw: Any
    ) -> T:
        """Return the result of `action`, while these attributes replace those of the modules."""
        originals = [
            (vars(module), name, vars(module).get(name), next(_NUMBERS))
            for module, name, _ in attributes
        ]
        outer = self._originals
        try:
            self._originals = (*outer, *originals)
            for module, name, value in attributes:
                vars(module)[name] = value
            return action(*args, **kw)
        finally:
            try:
                _restore(originals)
            except BaseException:  # an interrupt while they were restored
                _restore(originals)
                raise
            finally:
                self._originals = outer

    def put_back(self) -> None:
        """Restore all attributes, in a child process, where no call of the parent does it."""
        _restore(self._originals)
        self._originals = ()


def _restore(originals: Sequence[_Original]) -> None:
    for attributes, name, before, _ in reversed(originals):
        if before is None:
            attributes.pop(name, None)
        else:
            attributes[name] = before


#: Those of all sessions, since models may share modules.
_ALL: weakref.WeakSet[Replacements] = weakref.WeakSet()


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """The module's original forward, even while it is replaced."""
    attributes = vars(module)
    forward: Callable[..., Any] = module.forward
    if "forward" not in attributes:
        return forward
    if isinstance(forward, ReplacedMethod):
        return forward.original
    replaced = [
        (number, before)
        for replacements in list(_ALL)
        for holder, name, before, number in replacements._originals
        if holder is attributes and name == "forward"
    ]
    if not replaced:
        return forward
    _, before = min(replaced, key=itemgetter(0))
    if isinstance(before, ReplacedMethod):
        return before.original
    original: Callable[..., Any] = before or MethodType(type(module).forward, module)
    return original
