"""The arguments of the last call, kept so that nothing is kept alive by it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_PLAIN = (bool, int, float, str, type(None), torch.dtype)
_GONE = object()


class LastCall(NamedTuple):
    """Arguments of a call, whose tensors are held weakly."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> LastCall | None:
        """None where the call had more than tensors and plain values, such as a cache: that is not
        what it was any more."""
        for value in (*args, *kwargs.values()):
            if not isinstance(value, (Tensor, *_PLAIN)):
                return None
        return cls(tuple(map(_held, args)), {name: _held(v) for name, v in kwargs.items()})

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments; None where a tensor among them is gone."""
        args = tuple(map(_found, self.args))
        kwargs = {name: _found(value) for name, value in self.kwargs.items()}
        gone = any(value is _GONE for value in (*args, *kwargs.values()))
        return None if gone else (args, kwargs)


def _held(value: Any) -> Any:
    return weakref.ref(value) if isinstance(value, Tensor) else value


def _found(value: Any) -> Any:
    if not isinstance(value, weakref.ref):
        return value
    tensor = value()
    return _GONE if tensor is None else tensor
