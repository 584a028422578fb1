"""Attributes of modules that are replaced while the model runs: compiled forwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")

#: An attribute of a module and what it is while `generate` runs.
Replaced = tuple[nn.Module, str, Callable[..., Any]]
#: The attributes of a module, a name among them, and what it was, None where it was none.
_Original = tuple[dict[str, Any], str, Any]


class StandIns:
    """The attributes that are replaced now, which `replacing` alone writes."""

    def __init__(self) -> None:
        self._originals: Sequence[_Original] = ()

    def replacing(
        self, attributes: Sequence[Replaced], action: Callable[..., T], *args: Any, **kw: Any
    ) -> T:
        """What `action` returns, with these attributes in place of the modules' own."""
        own = [(vars(module), name, vars(module).get(name)) for module, name, _ in attributes]
        outer = self._originals
        try:
            self._originals = (*outer, *own)
            for module, name, value in attributes:
                vars(module)[name] = value
            return action(*args, **kw)
        finally:
            try:
                _put_back(own)
            except BaseException:  # an interrupt, in the middle of it
                _put_back(own)
                raise
            finally:
                self._originals = outer

    def put_back(self) -> None:
        """Give modules back all that they had. For a child process, where nobody else will."""
        _put_back(self._originals)
        self._originals = ()


def _put_back(originals: Sequence[_Original]) -> None:
    """The first that was replaced last."""
    for attributes, name, before in reversed(originals):
        if before is None:
            attributes.pop(name, None)
        else:
            attributes[name] = before
