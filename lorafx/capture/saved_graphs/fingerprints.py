"""Fingerprints: values as text that other processes can compare.

Code is identified by its bytecode, not its name, so replaced functions and edited files differ.
Values without such a text raise `Undescribed`; their class does not identify them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import types
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from lorafx.torch_internals.graph_parts import OpOverload, OpOverloadPacket, _dispatch_keys

#: Classes whose `repr` identifies the value.
PLAIN = (
    *(bool, int, float, complex, str, bytes, range, slice),
    *(type(None), type(...), type(NotImplemented)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)
_BUILT_IN = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)
#: Python's notes on a class that do not affect its behaviour.
_NOTES = frozenset(
    (
        *("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "_abc_impl"),
        *("__firstlineno__", "__static_attributes__", "__abstractmethods__", "__slotnames__"),
        *("__dataclass_fields__", "__annotations_cache__", "__annotate_func__"),
    )
)
#: Users' marks for Dynamo on a tensor's sizes.
_MARKS = (
    *("_dynamo_dynamic_indices", "_dynamo_weak_dynamic_indices", "_dynamo_unbacked_indices"),
    *("_dynamo_strict_unbacked_indices", "_dynamo_static_indices"),
)
_DEEPEST = 6


class Undescribed(Exception):
    """A value that cannot be compared with another process's."""


def digest(texts: Iterable[str]) -> str:
    found = hashlib.sha256()
    for text in texts:
        found.update(text.encode(errors="surrogatepass"))
        found.update(b"\0")
    return found.hexdigest()[:32]


class Fingerprints:
    """Texts of current values; `names` maps process-specific strings to portable ones."""

    def __init__(self, names: Mapping[str, str] | None = None) -> None:
        self._names = names or {}
        #: By identity; the value is kept, so that its id is not reused.
        self._texts: dict[int, tuple[object, str]] = {}

    def of(self, value: Any) -> str:
        """The text that identifies a value, or Undescribed."""
        return self._text(value, 0, loose=False)

    def loosely(self, value: Any, depth: int = 0) -> str:
        """As `of`, but other objects by class, and dataclasses by their fields."""
        return self._text(value, depth, loose=True)

    def of_class(self, cls: type) -> str:
        return self._kept(cls, lambda: f"{_name(cls)}#{digest(self._members(cls))}", _name(cls))

    def of_code(self, code: types.CodeType) -> str:
        """A code object, by bytecode and constants."""
        return self._kept(code, lambda: digest(self._code(code)), code.co_name)

    def tensor(self, value: Tensor) -> str:
        """A tensor without numbers, sizes and strides."""
        marks = {
            name: sorted(getattr(value, name))
            for name in _MARKS
            if isinstance(getattr(value, name, None), (set, frozenset))
        }
        return (
            f"{self.of_class(type(value))} {value.dtype} {value.device} {value.layout} "
            f"{value.dim()} grad {value.requires_grad} leaf {value.is_leaf} "
            f"{_dispatch_keys(value)} {value.is_inference()} {marks}"
        )

    def _text(self, value: Any, depth: int, *, loose: bool) -> str:
        if isinstance(value, Enum):
            return f"{_name(type(value))}.{value.name}"
        if isinstance(value, PLAIN):
            if isinstance(value, str) and value in self._names:
                return self._names[value]
            return f"{type(value).__qualname__} {value!r}"
        if isinstance(value, type):
            return self.of_class(value)
        if isinstance(value, types.FunctionType):
            return self._function(value, depth)
        if isinstance(value, types.MethodType):
            return f"{self.loosely(value.__func__, depth)} of {_name(type(value.__self__))}"
        if isinstance(value, _BUILT_IN):
            owner = getattr(value, "__self__", None)
            of = "" if owner is None or isinstance(owner, types.ModuleType) else _name(type(owner))
            home = getattr(value, "__module__", None)
            if value is hash:  # hashes of text differ by process
                of = f"{hash(home)}"
            return f"built-in {home}.{getattr(value, '__qualname__', value)} {of}"
        if isinstance(value, types.ModuleType):
            return f"module {value.__name__}"
        if isinstance(value, types.CodeType):
            return self.of_code(value)
        if isinstance(value, (OpOverload, OpOverloadPacket)):
            return f"operator {value}"
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            return f"partial {self._text(parts, depth + 1, loose=loose)}"
        name = _name(type(value))
        if depth < _DEEPEST and loose and dataclasses.is_dataclass(value):
            return self._kept(value, lambda: f"{name}({self._fields(value, depth)})", name)
        if depth < _DEEPEST and isinstance(value, Mapping if loose else dict):
            value = list(value.items())
        if depth < _DEEPEST and isinstance(value, (tuple, list, set, frozenset)):
            texts = [self._text(item, depth + 1, loose=loose) for item in value]
            return f"{name}{sorted(texts) if isinstance(value, (set, frozenset)) else texts}"
        if loose:
            return f"a {name}"
        raise Undescribed(f"a {name}")

    def _fields(self, value: Any, depth: int) -> list[str]:
        return [
            f"{field.name}={self.loosely(getattr(value, field.name, None), depth + 1)}"
            for field in dataclasses.fields(value)
        ]

    def _function(self, function: types.FunctionType, depth: int) -> str:
        name = f"{function.__module__}.{function.__qualname__}"
        return self._kept(
            function, lambda: f"{name}#{digest(self._function_parts(function, depth))}", name
        )

    def _function_parts(self, function: types.FunctionType, depth: int) -> Iterable[str]:
        if getattr(function, "_dynamo_marked_constant", False):
            # Dynamo called it without guards on what it read.
            raise Undescribed(f"{function.__qualname__}, whose result is taken for a constant")
        yield self.of_code(function.__code__)
        for value in (function.__defaults__, function.__kwdefaults__):
            yield self.loosely(value, depth + 1)
        for cell in function.__closure__ or ():
            try:
                held = cell.cell_contents
            except ValueError:  # not bound yet
                yield "empty"
                continue
            yield self._member(held, depth + 1)

    def _members(self, cls: type) -> Iterable[str]:
        for base in cls.__mro__:
            yield _name(base)
            if base.__flags__ & 1 << 9:  # a mutable class, not one of C's
                for name, value in sorted(vars(base).items()):
                    if name not in _NOTES:
                        yield f"{name} {self._member(value, 1)}"

    def _member(self, value: Any, depth: int) -> str:
        if isinstance(value, type):
            return _name(value)
        if isinstance(value, (staticmethod, classmethod)):
            return f"{type(value).__name__} {self._member(value.__func__, depth)}"
        if isinstance(value, property):
            parts = (value.fget, value.fset, value.fdel)
            return f"property {[self._member(part, depth) for part in parts]}"
        if isinstance(value, functools.cached_property):
            return f"cached {self._member(value.func, depth)}"
        if depth >= _DEEPEST or not isinstance(value, (types.FunctionType, *PLAIN, *_BUILT_IN)):
            return f"a {_name(type(value))}"
        return self._text(value, depth, loose=True)

    def _code(self, code: types.CodeType) -> Iterable[str]:
        counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        yield repr((code.co_name, counts, code.co_flags, names))
        yield code.co_code.hex()
        yield getattr(code, "co_exceptiontable", b"").hex()
        for value in code.co_consts:
            yield self._constant(value)

    def _constant(self, value: Any) -> str:
        if isinstance(value, types.CodeType):
            return self.of_code(value)
        if isinstance(value, (tuple, frozenset)):
            texts = [self._constant(item) for item in value]
            return (
                f"{type(value).__name__}{sorted(texts) if isinstance(value, frozenset) else texts}"
            )
        return f"{type(value).__name__} {value!r}"

    def _kept(self, value: object, text: Callable[[], str], meanwhile: str) -> str:
        """The memoised `text()`; `meanwhile` in cycles."""
        if id(value) not in self._texts:
            self._texts[id(value)] = value, meanwhile
            self._texts[id(value)] = value, text()
        return self._texts[id(value)][1]


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
