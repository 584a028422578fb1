"""Fingerprints: texts that identify values, so that other processes can compare them.

Code is identified by its bytecode and not by its name, so a replaced function or an edited file
gives another text. A value that no text identifies raises `Undescribed`.
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

from lorafx.model.marks import is_unchanged
from lorafx.model.stored_experts import stored_of
from lorafx.model.weight_formats import is_wrapped
from lorafx.torch_internals.dynamo import derives
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
#: Attributes that Python gives a class and that do not affect its behaviour.
_IGNORED_ATTRIBUTES = frozenset(
    (
        *("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "_abc_impl"),
        *("__firstlineno__", "__static_attributes__", "__abstractmethods__", "__slotnames__"),
        *("__dataclass_fields__", "__annotations_cache__", "__annotate_func__"),
    )
)
#: Attributes by which users tell Dynamo about a tensor's sizes.
_SIZE_MARKS = (
    *("_dynamo_dynamic_indices", "_dynamo_weak_dynamic_indices", "_dynamo_unbacked_indices"),
    *("_dynamo_strict_unbacked_indices", "_dynamo_static_indices"),
)
#: What they read follows from the place in the graph and the gradient mode, which is guarded, or is
#: in the key, as forwards of modules and what tensors are made of are.
_OWN_CONSTANTS = (derives, is_unchanged, stored_of)
_MAX_DEPTH = 6  # values that are nested deeper are identified by their class


class Undescribed(Exception):
    """A value cannot be compared with that of another process."""


def digest(texts: Iterable[str]) -> str:
    hashed = hashlib.sha256()
    for text in texts:
        hashed.update(text.encode(errors="surrogatepass"))
        hashed.update(b"\0")
    return hashed.hexdigest()[:32]


class Fingerprints:
    """The texts of values as they are now; `names` replaces strings that differ by process."""

    def __init__(self, names: Mapping[str, str] | None = None) -> None:
        self._names = names or {}
        #: Texts by identity. The values are kept, so that no id is reused.
        self._texts: dict[int, tuple[object, str]] = {}

    def of(self, value: Any) -> str:
        """The text that identifies a value. Raises Undescribed if there is none."""
        return self._text(value, 0, loose=False)

    def loosely(self, value: Any, depth: int = 0) -> str:
        """As `of`, but dataclasses by their fields, and objects without a text by their class."""
        return self._text(value, depth, loose=True)

    def of_class(self, cls: type) -> str:
        return self._memoised(cls, lambda: f"{_name(cls)}#{digest(self._members(cls))}", _name(cls))

    def of_code(self, code: types.CodeType) -> str:
        """The text of a code object, from its bytecode, names and constants."""
        return self._memoised(code, lambda: digest(self._code(code)), code.co_name)

    def tensor(self, value: Tensor) -> str:
        """The text of a tensor, without its numbers, sizes and strides."""
        marks = {
            name: sorted(getattr(value, name))
            for name in _SIZE_MARKS
            if isinstance(getattr(value, name, None), (set, frozenset))
        }
        parts = ""
        if is_wrapped(value):
            names, context = value.__tensor_flatten__()  # type: ignore[attr-defined]
            inner = [getattr(value, name) for name in names]
            sizes = [(tuple(item.shape), item.stride()) for item in inner]
            parts = f"{names} {[self.tensor(item) for item in inner]} {sizes} {self.of(context)} "
        return parts + (
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
            if value is hash:  # which gives other values in another process
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
        if depth < _MAX_DEPTH and loose and dataclasses.is_dataclass(value):
            return self._memoised(value, lambda: f"{name}({self._fields(value, depth)})", name)
        if depth < _MAX_DEPTH and isinstance(value, Mapping if loose else dict):
            value = list(value.items())
        if depth < _MAX_DEPTH and isinstance(value, (tuple, list, set, frozenset)):
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
        return self._memoised(
            function, lambda: f"{name}#{digest(self._function_parts(function, depth))}", name
        )

    def _function_parts(self, function: types.FunctionType, depth: int) -> Iterable[str]:
        if getattr(function, "_dynamo_marked_constant", False) and function not in _OWN_CONSTANTS:
            # Dynamo called it without guards on what it read.
            raise Undescribed(f"{function.__qualname__}, whose result is taken for a constant")
        yield self.of_code(function.__code__)
        for value in (function.__defaults__, function.__kwdefaults__):
            yield self.loosely(value, depth + 1)
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # not bound yet
                yield "empty"
                continue
            yield self._member(content, depth + 1)

    def _members(self, cls: type) -> Iterable[str]:
        for base in cls.__mro__:
            yield _name(base)
            if base.__flags__ & 1 << 9:  # a class of Python
                for name, value in sorted(vars(base).items()):
                    if name not in _IGNORED_ATTRIBUTES:
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
        if depth >= _MAX_DEPTH or not isinstance(value, (types.FunctionType, *PLAIN, *_BUILT_IN)):
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

    def _memoised(self, value: object, text: Callable[[], str], meanwhile: str) -> str:
        """The text of `value`, made once by `text()`; `meanwhile` stands for it inside a cycle."""
        if id(value) not in self._texts:
            self._texts[id(value)] = value, meanwhile
            self._texts[id(value)] = value, text()
        return self._texts[id(value)][1]


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
