"""Guards on one layer, and the same ones on another.

A guard says of something that is reached through a source, such as `L['self'].layers[0].scale`,
that it is what it was. It holds for another layer where the same is true of what is reached
through `L['self'].layers[1].scale`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn
from torch._dynamo.guards import install_guard, make_dupe_guard
from torch._dynamo.source import NNModuleSource
from torch._guards import ChainedSource, Guard, Source

from lorafx.capture.replay_arguments import NotAlike, same_constant
from lorafx.capture.replay_sources import Scope

#: What Dynamo guards by what it is, wherever it is reached.
_BY_IDENTITY = (type, ModuleType, FunctionType, MethodType, BuiltinFunctionType)
_HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class _Exchanged:
    """Sources with some of their parts exchanged."""

    def __init__(self, parts: dict[Source, Source]) -> None:
        self._parts = parts
        self._known: dict[int, tuple[Source, Source]] = {}

    def __call__(self, source: Source) -> Source:
        known = self._known.get(id(source))
        if known is not None:
            return known[1]
        new = self._parts.get(source)
        if new is None:
            changes: dict[str, Any] = {}
            each: Any = source
            for part in dataclasses.fields(each):
                value = getattr(source, part.name)
                if isinstance(value, Source) and (other := self(value)) is not value:
                    changes[part.name] = other
            new = dataclasses.replace(each, **changes) if changes else source
        self._known[id(source)] = source, new
        return new


def _sources(layer: Any) -> list[Source]:
    """Those of the layer itself: as Dynamo marks what belongs to modules, and as it is reached."""
    found = [layer.source]
    while isinstance(found[-1], NNModuleSource):
        found.append(found[-1].base)
    return found


def _item_sources(items: Iterable[Any]) -> list[Source]:
    """Those of items of lists, of what was there before the frame."""
    return [item.source for item in items if item.source is not None]


class _Nowhere(Source):
    """Stands for the layer in sources that only need to be told apart."""


class Guards:
    """The guards that a layer has when it has been traced, and inputs that are reached through it.

    Made before it is traced, and completed by `end`.
    """

    def __init__(self, tx: Any, scope: Scope, layer: Any) -> None:
        self.scope = scope
        self.module: nn.Module = layer.value
        self.sources = _sources(layer)
        #: Items of lists that the layer picks by numbers of its own.
        self.items: list[Any] = []
        self._through_items = _Exchanged({})
        self._through = _Exchanged(dict.fromkeys(self.sources, _Nowhere()))
        self._before = len(tx.output.guards)
        self.found: list[Guard] = []
        #: New ones on what is not the layer's, which name one of its hooks.
        self.hooks: list[Guard] = []
        #: Dictionaries whose order is guarded.
        self.ordered: list[Source] = []

    def concerns(self, source: Source) -> bool:
        """Whether it leads through the layer, or through an item that it picks."""
        return self._through(source) is not source

    def through_item(self, source: Source) -> bool:
        """Whether it leads through an item that the layer picks."""
        return self._through_items(source) is not source

    def number(self, layer: Any) -> Callable[[Source], Any]:
        """What another layer has at a source of this one's."""
        exchanged = self._exchanged(layer, {})
        return lambda source: self.scope.value(exchanged(source))

    def _exchanged(self, layer: Any, items: Mapping[Any, Any]) -> Callable[[Source], Source]:
        """Another layer's sources and its items' in place of this one's; None is this one.

        Raises:
            NotAlike: they are not reached alike.
        """
        sources = self.sources if layer is None else _sources(layer)
        parts = dict(zip(self.sources, sources, strict=False))
        for mine, other in items.items():
            if (mine.source is None) != (other.source is None):
                raise NotAlike("an item is from somewhere else")
            if mine.source is not None:
                parts[mine.source] = other.source
        if len(sources) != len(self.sources):
            raise NotAlike("reached in another way")
        return _Exchanged(parts)

    def end(self, tx: Any, changed: Collection[int], items: Iterable[Any] = ()) -> None:
        """The layer has been traced, which picked these items. The objects of these identities were
        not what they are outside of the frame.

        Raises:
            NotAlike: one of them is the layer's, or that is reached in two ways.
        """
        self.items = list(items)
        roots = _item_sources(self.items)
        self._through = _Exchanged(dict.fromkeys([*self.sources, *roots], _Nowhere()))
        self._through_items = _Exchanged(dict.fromkeys(roots, _Nowhere()))
        names = [source.name for source in (self.sources[-1], *roots)]
        for place, guard in enumerate(tx.output.guards):
            if self.concerns(guard.originating_source):
                self.found.append(guard)
            elif place >= self._before:
                if any(name in guard.name for name in names):
                    raise NotAlike(f"{guard.name} is reached in two ways")
                given = (each for each in _keywords(guard).values() if isinstance(each, Source))
                if self.items and any(map(self.concerns, given)):
                    raise NotAlike(f"{guard.name} is also something else")
                if "key" in _keywords(guard):
                    self.hooks.append(guard)
        self.ordered = [each for each in tx.output.guard_on_key_order if self.concerns(each)]
        if changed:
            own = Moved(self, tx, None, changed, {item: item for item in self.items})
            for guard in self.found:
                own.common(guard.originating_source)


class Moved:
    """The guards of one layer on another one; None is the same one again.

    `changed` are identities of objects that are otherwise in the frame than their sources say;
    `items` are the other layer's by those that the traced one picked.

    Raises:
        NotAlike: they are not made alike.
    """

    def __init__(
        self,
        guards: Guards,
        tx: Any,
        layer: Any,
        changed: Collection[int],
        items: Mapping[Any, Any],
    ) -> None:
        module = guards.module if layer is None else layer.value
        if id(module) in changed or any(id(item.value) in changed for item in items.values()):
            raise NotAlike("the layer is being changed")
        self._changed = changed
        self._guards = guards
        self._output = tx.output
        self.source: Callable[[Source], Source] = guards._exchanged(layer, items)
        self._roots = [*guards.sources, *_item_sources(items)]
        self._hooks = _hooks(guards.module, module)
        self._common: dict[int, Source | None] = {}
        #: Sources of the traced layer where both lead to one object.
        self._alike: dict[Source, None] = {}

    def before(self, source: Source) -> Any:
        return self._guards.scope.value(source)

    def now(self, source: Source) -> Any:
        return self._guards.scope.value(self.source(source))

    def common(self, source: Source) -> Source | None:
        """The first part of a source of the traced layer where both layers lead to one object,
        which Dynamo knows already. What is behind it is the same for both.

        Raises:
            NotAlike: a part in front of it is being changed.
        """
        if not isinstance(source, ChainedSource) or not self._guards.concerns(source):
            return None
        if source in self._roots:
            return None
        if id(source) not in self._common:
            found = self.common(source.base)
            if found is None:
                try:
                    before, value = self.before(source), self.now(source)
                except NotAlike:  # the guard is on there being no such attribute
                    before, value = None, self
                if id(value) in self._changed:
                    raise NotAlike(f"{source.name} is being changed")
                if value is before and value in self._output.side_effects:
                    self._alike[source] = None
                    found = None if isinstance(value, _BY_IDENTITY) else source
            self._common[id(source)] = found
        return self._common[id(source)]

    def is_new(self, value: Any, source: Source) -> bool:
        """Whether Dynamo has met this value nowhere else than at the other layer's `source`."""
        effects = self._output.side_effects
        return value not in effects or effects[value].source == self.source(source)

    def check(self) -> None:
        """Raise NotAlike where a guard does not hold for the other layer."""
        for guard in self._guards.found:
            if self.common(guard.originating_source) is None:
                kind = guard.inner_create_fn().__name__
                holds = _HOLDS.get(kind)
                if holds is None or not holds(self, guard):
                    raise NotAlike(f"{kind} of {guard.name}")

    def install(self) -> None:
        """Guard the other layer. Guards on tensors are those of graph inputs, and are there."""
        made = []
        for guard in self._guards.found:
            source, kind = guard.originating_source, guard.inner_create_fn().__name__
            if self.common(source) is None and kind != "TENSOR_MATCH":
                made.append(self._copied(guard, self.source(source)))
        for source in self._alike:
            known = self._output.side_effects[self.now(source)].source
            create = make_dupe_guard(self.source(source), known)
            if create is not None:
                made.append(Guard(self.source(source), create))
        for guard in self._guards.hooks:
            if _keywords(guard)["key"] in self._hooks:
                made.append(self._copied(guard, guard.originating_source))
        install_guard(*made)
        for source in self._guards.ordered:
            if self.common(source) is None:
                self._output.guard_on_key_order.add(self.source(source))

    def _copied(self, guard: Guard, source: Source) -> Guard:
        create = guard.create_fn
        if isinstance(create, functools.partial):
            named = dict(create.keywords)
            for name, value in named.items():
                if isinstance(value, Source):
                    named[name] = self.source(value)
                elif name == "key":
                    named[name] = self.key(value)
            create = functools.partial(create.func, *create.args, **named)
        return Guard(source, create, user_stack=guard.user_stack)

    def key(self, key: Any) -> Any:
        """The key in a dictionary of the other layer: hooks have numbers of their own."""
        return self._hooks.get(key, key) if type(key) is int else key


def _keywords(guard: Guard) -> dict[str, Any]:
    create = guard.create_fn
    return create.keywords if isinstance(create, functools.partial) else {}


def _hooks(one: nn.Module, other: nn.Module) -> dict[int, int]:
    """By the numbers of one module's hooks those of another's."""
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


def _values(moved: Moved, guard: Guard) -> tuple[Any, Any]:
    return moved.before(guard.originating_source), moved.now(guard.originating_source)


def _identical(moved: Moved, guard: Guard) -> bool:
    one, other = _values(moved, guard)
    return one is other


def _equal(moved: Moved, guard: Guard) -> bool:
    return same_constant(*_values(moved, guard))


def _type(moved: Moved, guard: Guard) -> bool:
    one, other = _values(moved, guard)
    return type(one) is type(other)


def _length(moved: Moved, guard: Guard) -> bool:
    one, other = _values(moved, guard)
    return type(one) is type(other) and len(one) == len(other)


def _keys(moved: Moved, guard: Guard) -> bool:
    one, other = _values(moved, guard)
    return type(one) is type(other) and same_constant(list(one), list(other))


def _contains(moved: Moved, guard: Guard) -> bool:
    one, other = _values(moved, guard)
    key = _keywords(guard)["key"]
    return type(one) is type(other) and (key in one) == (moved.key(key) in other)


def _absent(moved: Moved, guard: Guard) -> bool:
    one, other = _values(moved, guard)
    name = _keywords(guard)["attr"]
    return type(one) is type(other) and (name in vars(one)) == (name in vars(other))


def _has(moved: Moved, guard: Guard) -> bool:
    source, name = guard.originating_source, _keywords(guard).get("attr")
    if name is None:  # before torch 2.12 it is the last part of the source
        source, name = source.base, source.member  # type: ignore[attr-defined]
    one, other = moved.before(source), moved.now(source)
    return type(one) is type(other) and hasattr(one, name) == hasattr(other, name)


def _duplicate(moved: Moved, guard: Guard) -> bool:
    return moved.now(guard.originating_source) is moved.now(_keywords(guard)["source_b"])


def _not_none(moved: Moved, guard: Guard) -> bool:
    one, other = _values(moved, guard)
    return (one is None) == (other is None)


#: By the names of Dynamo's guards, whether one holds for another layer as for the traced one. What
#: is not here is not known to.
_HOLDS: dict[str, Callable[[Moved, Guard], bool]] = {
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
    "HASATTR": _has,
    "DUPLICATE_INPUT": _duplicate,
    "NOT_NONE_MATCH": _not_none,
}
