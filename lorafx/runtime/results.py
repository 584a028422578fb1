"""A call's result holds values. Code in it would run when the call has ended, without adapters."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Mapping, Sequence
from enum import Enum
from functools import lru_cache, partial
from types import BuiltinFunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform

from lorafx.eager.undo import class_of
from lorafx.errors import CaptureError
from lorafx.libraries import CACHE, class_of_library

_VALUES = (Tensor, str, bytes, int, float, complex, torch.dtype, torch.device)
#: Values, and what a result may refer to without calling it.
_PLAIN = (*_VALUES, type(None), type, ModuleType, Enum, logging.Logger)
_CODE: Any = (Callable, Generator, AsyncGenerator, Coroutine)
#: Callables that compute by what they hold alone, which is looked at.
_LOOKED_THROUGH = (partial, BuiltinFunctionType, weakref.ref, Transform)


def refuse_code(result: object, name: str) -> None:
    """Raise CaptureError if the result of `name` holds code that would run later, at any depth: a
    function or another callable, a generator, a coroutine or a module. Iterators such as map are
    looked through."""
    # A link is a value with the link of what holds it.
    links: list[tuple[Any, Any]] = [(result, None)]
    seen: set[int] = set()
    while links:
        link = links.pop()
        value, cls = link[0], class_of(link[0])
        if _is_plain(cls) or id(value) in seen:
            continue
        seen.add(id(value))
        if _is_code(cls):
            if isinstance(value, Coroutine):
                value.close()  # Python would warn that nobody has awaited it
            place = _place(link)
            raise CaptureError(
                f"the result of {name} {'holds' if place else 'is'} a {cls.__qualname__}{place}, "
                "which would run after the call has ended, without its adapters; return what it "
                "computes"
            )
        parts = (value(),) if isinstance(value, weakref.ref) else gc.get_referents(value)
        links += [(part, link) for part in parts]


@lru_cache(256)
def _is_plain(cls: type) -> bool:
    cache = class_of_library(*CACHE)
    # A subclass of somebody else may hold anything.
    of_transformers = cls.__module__.partition(".")[0] == "transformers"
    return issubclass(cls, _PLAIN) or (
        of_transformers and cache is not None and issubclass(cls, cache)
    )


@lru_cache(256)
def _is_code(cls: type) -> bool:
    return issubclass(cls, _CODE) and not issubclass(cls, _LOOKED_THROUGH)


def _place(link: tuple[Any, Any]) -> str:
    """Such as " at ['states'][0].next"; empty for the result itself."""
    value, holder = link
    if holder is None:
        return ""
    if holder[1] is not None and holder[0] is getattr(holder[1][0], "__dict__", None):
        holder = holder[1]  # whose attributes they are
    outer, held_by = _place(holder) or " at ", holder[0]
    attributes = getattr(held_by, "__dict__", {})
    items: Any = ()
    if isinstance(held_by, Mapping):
        items = held_by.items()
    elif isinstance(held_by, Sequence):
        items = enumerate(held_by)
    for form, pairs in (("[{!r}]", items), (".{}", attributes.items())):
        for key, item in pairs:
            if item is value:
                return outer + form.format(key)
    return outer
