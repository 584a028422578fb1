"""Attributes of modules that are replaced while the model runs: compiled forwards."""

from __future__ import annotations

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
    replaced = [
        (number, before)
        for stand_ins in list(_ALL)
        for holder, name, before, number in stand_ins._originals
        if holder is attributes and name == "forward"
    ]
    if not replaced:
        return forward
    _, before = min(replaced, key=itemgetter(0))
    original: Callable[..., Any] = before or MethodType(type(module).forward, module)
    return original
