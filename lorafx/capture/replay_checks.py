"""Whether a guard of a traced layer holds for another one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

from torch import nn
from torch._guards import Guard, Source

from lorafx.capture.replay_arguments import NotAlike, same_constant

_HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class Other(Protocol):
    """What another layer has where the traced one has something."""

    def before(self, source: Source) -> Any:
        """What the traced layer has at its source."""
        ...

    def now(self, source: Source) -> Any:
        """What the other layer has there."""
        ...

    def key(self, key: Any) -> Any:
        """The other layer's key in a dictionary."""
        ...


#: Takes what both layers have at a guard's source, the guard, and the other layer.
Check: TypeAlias = Callable[[Any, Any, Guard, Other], bool]


def keywords_of(guard: Guard) -> dict[str, Any]:
    create = guard.create_fn
    return create.keywords if isinstance(create, functools.partial) else {}


def hooks_of(one: nn.Module, other: nn.Module) -> dict[int, int]:
    """By the numbers of one module's hooks those of another's.

    Raises:
        NotAlike: the modules are not made alike.
    """
    found: dict[int, int] = {}
    mine, theirs = list(one.modules()), list(other.modules())
    if [type(module) for module in mine] != [type(module) for module in theirs]:
        raise NotAlike("made of other modules")
    for a, b in zip(mine, theirs, strict=True):
        for name in ("__dict__", "_parameters", "_buffers", "_modules"):
            if getattr(a, name).keys() != getattr(b, name).keys():
                raise NotAlike("other attributes")
        for name in _HOOKS:
            if len(getattr(a, name)) != len(getattr(b, name)):
                raise NotAlike("other hooks")
            found.update(zip(getattr(a, name), getattr(b, name), strict=True))
    return found


def check_of(guard: Guard) -> tuple[Check | None, bool]:
    """Whether a guard holds for another layer as for the traced one, None where that is not known
    to; and whether what they have at its source is asked for."""
    kind = guard.inner_create_fn().__name__
    if kind in _BY_SOURCE:
        return _BY_SOURCE[kind], False
    return _BY_VALUES.get(kind), True


def _identical(one: Any, other: Any, guard: Guard, layer: Other) -> bool:
    return one is other


def _equal(one: Any, other: Any, guard: Guard, layer: Other) -> bool:
    return same_constant(one, other)


def _type(one: Any, other: Any, guard: Guard, layer: Other) -> bool:
    return type(one) is type(other)


def _length(one: Any, other: Any, guard: Guard, layer: Other) -> bool:
    return type(one) is type(other) and len(one) == len(other)


def _keys(one: Any, other: Any, guard: Guard, layer: Other) -> bool:
    return type(one) is type(other) and same_constant(list(one), list(other))


def _contains(one: Any, other: Any, guard: Guard, layer: Other) -> bool:
    key = keywords_of(guard)["key"]
    return type(one) is type(other) and (key in one) == (layer.key(key) in other)


def _absent(one: Any, other: Any, guard: Guard, layer: Other) -> bool:
    name = keywords_of(guard)["attr"]
    return type(one) is type(other) and (name in vars(one)) == (name in vars(other))


def _not_none(one: Any, other: Any, guard: Guard, layer: Other) -> bool:
    return (one is None) == (other is None)


def _has(one: Any, other: Any, guard: Guard, layer: Other) -> bool:
    source, name = guard.originating_source, keywords_of(guard).get("attr")
    if name is None:  # before torch 2.12 it is the last part of the source
        source, name = source.base, source.member  # type: ignore[attr-defined]
    one, other = layer.before(source), layer.now(source)
    return type(one) is type(other) and hasattr(one, name) == hasattr(other, name)


def _duplicate(one: Any, other: Any, guard: Guard, layer: Other) -> bool:
    return bool(layer.now(guard.originating_source) is layer.now(keywords_of(guard)["source_b"]))


#: By the names of Dynamo's guards, whether one holds for another layer as for the traced one. What
#: is in neither of these is not known to.
_BY_VALUES: dict[str, Check] = {
    **dict.fromkeys(
        ("ID_MATCH", "CLOSURE_MATCH", "FUNCTION_MATCH", "CLASS_MATCH", "MODULE_MATCH"), _identical
    ),
    "BUILTIN_MATCH": _identical,
    **dict.fromkeys(("CONSTANT_MATCH", "EQUALS_MATCH", "BOOL_MATCH", "NONE_MATCH"), _equal),
    "TYPE_MATCH": _type,
    "TENSOR_MATCH": _type,  # the rest is looked at in the graph's input
    "SEQUENCE_LENGTH": _length,
    "EMPTY_NN_MODULE_HOOKS_DICT": _length,
    "DICT_KEYS_MATCH": _keys,
    "DICT_CONTAINS": _contains,
    "DICT_NOT_CONTAINS": _contains,
    "NOT_PRESENT_IN_GENERIC_DICT": _absent,
    "NOT_NONE_MATCH": _not_none,
}
#: The same of guards on something else than what their source leads to.
_BY_SOURCE: dict[str, Check] = {"HASATTR": _has, "DUPLICATE_INPUT": _duplicate}
