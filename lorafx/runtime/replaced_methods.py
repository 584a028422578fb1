"""Attributes of modules that are replaced while the model runs: compiled forwards."""

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

#: A module, the name of an attribute, and what it is meanwhile.
Replaced = tuple[nn.Module, str, Callable[..., Any]]
#: The attributes of a module, a name among them, and what it was, None where it was none; of those
#: that are replaced now the first has the least number.
_Original = tuple[dict[str, Any], str, Any, int]
_NUMBERS = itertools.count()


class InPlace:
    """Stands in the place of a module's method until `put_back`. Copies and pickles of the module
    have the method itself."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name
        self.original: Callable[..., Any] = getattr(model, name)
        self._before = vars(model).get(name)
        functools.update_wrapper(self, self.original, updated=())  # its signature

    def put_in_place(self) -> None:
        vars(self.model)[self.name] = self

    def put_back(self) -> None:
        """Unless something else stands there now."""
        if vars(self.model).get(self.name) is self:
            _put_back([(vars(self.model), self.name, self._before, 0)])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    @property
    def __code__(self) -> Any:
        return self.original.__code__  # torch.export asks a forward for it

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _itself, (self.original,)


def _itself(method: Callable[..., Any]) -> Callable[..., Any]:
    return method


class StandIns:
    """The attributes that are replaced now, which `replacing` alone writes."""

    def __init__(self) -> None:
        self._originals: Sequence[_Original] = ()
        _ALL.add(self)

    def replacing(
        self, attributes: Sequence[Replaced], action: Callable[..., T], *args: Any, **kw: Any
    ) -> T:
        """What `action` returns, with these attributes in place of the modules' own."""
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
                _put_back(originals)
            except BaseException:  # an interrupt, in the middle of it
                _put_back(originals)
                raise
            finally:
                self._originals = outer

    def put_back(self) -> None:
        """Give modules back all that they had. For a child process, where nobody else will."""
        _put_back(self._originals)
        self._originals = ()


def _put_back(originals: Sequence[_Original]) -> None:
    for attributes, name, before, _ in reversed(originals):
        if before is None:
            attributes.pop(name, None)
        else:
            attributes[name] = before


#: Those of all sessions. Models may share modules.
_ALL: weakref.WeakSet[StandIns] = weakref.WeakSet()


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """The module's own forward, whatever stands in for it now."""
    attributes = vars(module)
    forward: Callable[..., Any] = module.forward
    if "forward" not in attributes:
        return forward
    if isinstance(forward, InPlace):
        return forward.original
    replaced = [
        (number, before)
        for stand_ins in list(_ALL)
        for holder, name, before, number in stand_ins._originals
        if holder is attributes and name == "forward"
    ]
    if not replaced:
        return forward
    _, before = min(replaced, key=itemgetter(0))
    if isinstance(before, InPlace):
        return before.original
    original: Callable[..., Any] = before or MethodType(type(module).forward, module)
    return original
