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
from torch._guards import Guard, Source

from lorafx.capture.deferred_guards import defer
from lorafx.capture.dropped_guards import ACTIVE
from lorafx.capture.replay_arguments import NotAlike
from lorafx.capture.replay_checks import Check, check_of, hooks_of, keywords_of
from lorafx.capture.replay_places import NOTHING, SourcePlaces
from lorafx.capture.replay_sources import FrameScope
from lorafx.captured_frame import source_text

#: What Dynamo guards by what it is, wherever it is reached.
_BY_IDENTITY = (type, ModuleType, FunctionType, MethodType, BuiltinFunctionType)


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


@dataclasses.dataclass(frozen=True)
class _Planned:
    """A guard of a traced layer: where its source stands, and how it is checked of another one."""

    guard: Guard
    place: int
    holds: Check | None
    #: Whether the check takes what is there.
    looks: bool
    #: Whether it is one that other layers get a copy of. Those on tensors are those of graph
    #: inputs.
    copied: bool


class _Nowhere(Source):
    """Stands for the layer in sources that only need to be told apart."""


class Guards:
    """The guards that a layer has when it has been traced, and inputs that are reached through it.

    Made before it is traced, and completed by `end`.
    """

    def __init__(self, tx: Any, scope: FrameScope, layer: Any) -> None:
        self.scope = scope
        self.module: nn.Module = layer.value
        self.sources = _sources(layer)
        #: Items of lists that the layer picks by numbers of its own.
        self.items: list[Any] = []
        self._through_items = _Exchanged({})
        self._through = _Exchanged(dict.fromkeys(self.sources, _Nowhere()))
        self._before = len(tx.output.guards.inner)  # not those that are deferred
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
        for place, guard in enumerate(tx.output.guards.inner):
            if self.concerns(guard.originating_source):
                self.found.append(guard)
            elif place >= self._before:
                if any(name in guard.name for name in names):
                    raise NotAlike(f"{guard.name} is reached in two ways")
                given = (each for each in keywords_of(guard).values() if isinstance(each, Source))
                if self.items and any(map(self.concerns, given)):
                    raise NotAlike(f"{guard.name} is also something else")
                if "key" in keywords_of(guard):
                    self.hooks.append(guard)
        self.ordered = [each for each in tx.output.guard_on_key_order if self.concerns(each)]
        self.places = SourcePlaces(self.scope, {*self.sources, *roots}, self.concerns)
        if changed:
            own = Moved(self, tx, None, changed, {item: item for item in self.items})
            for guard in self.found:
                own.common(guard.originating_source)

    @functools.cached_property
    def plan(self) -> list[_Planned]:
        """What is checked of another layer, guard by guard."""
        found = []
        for guard in self.found:
            holds, looks = check_of(guard)
            copied = guard.inner_create_fn().__name__ != "TENSOR_MATCH"
            place = self.places.place(guard.originating_source)
            found.append(_Planned(guard, place, holds, looks, copied))
        return found

    @functools.cached_property
    def duplicates(self) -> set[tuple[Source, Source | None]]:
        """Sources that are guarded to lead to one object."""
        return {
            (each.guard.originating_source, keywords_of(each.guard).get("source_b"))
            for each in self.plan
            if each.guard.inner_create_fn().__name__ == "DUPLICATE_INPUT"
        }

    @functools.cached_property
    def active(self) -> list[int]:
        """Where the guards are that tell whether an adapter is active."""
        return [each.place for each in self.plan if source_text(each.guard).endswith(ACTIVE)]


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
        self._hooks = hooks_of(guards.module, module)
        #: By places.
        self._values: dict[int, Any] = {}
        self._common: dict[int, Source | None] = {}
        #: Sources of the traced layer where both lead to one object.
        self._alike: dict[Source, None] = {}

    def before(self, source: Source) -> Any:
        return self._guards.scope.value(source)

    def now(self, source: Source) -> Any:
        if not self._guards.concerns(source):
            return self._guards.scope.value(source)
        value = self._at(self._guards.places.place(source))
        if value is NOTHING:
            raise NotAlike(f"there is no {source.name}")
        return value

    def _at(self, place: int) -> Any:
        """What the other layer has at a place, or NOTHING."""
        if place not in self._values:
            places = self._guards.places
            base = places.bases[place]
            before = NOTHING if base < 0 else self._at(base)
            self._values[place] = places.after(place, before, self.source)
        return self._values[place]

    def common(self, source: Source) -> Source | None:
        """The first part of a source of the traced layer where both layers lead to one object,
        which Dynamo knows already. What is behind it is the same for both.

        Raises:
            NotAlike: a part in front of it is being changed.
        """
        if not self._guards.concerns(source):
            return None
        return self._common_at(self._guards.places.place(source))

    def _common_at(self, place: int) -> Source | None:
        if place not in self._common:
            self._common[place] = self._common_of(place)
        return self._common[place]

    def _common_of(self, place: int) -> Source | None:
        places = self._guards.places
        if not places.is_inside(place):
            return None
        base = places.bases[place]
        found = None if base < 0 else self._common_at(base)
        if found is not None:
            return found
        before, value = places.before(place), self._at(place)
        if before is NOTHING or value is NOTHING:  # the guard is on there being no such attribute
            return None
        source = places.sources[place]
        if id(value) in self._changed:
            raise NotAlike(f"{source.name} is being changed")
        if value is before and value in self._output.side_effects:
            self._alike[source] = None
            return None if isinstance(value, _BY_IDENTITY) else source
        return None

    def is_new(self, value: Any, source: Source) -> bool:
        """Whether Dynamo has met this value nowhere else than at the other layer's `source`."""
        effects = self._output.side_effects
        return value not in effects or effects[value].source == self.source(source)

    def check(self) -> None:
        """Raise NotAlike where a guard does not hold for the other layer."""
        places = self._guards.places
        for each in self._guards.plan:
            if self._common_at(each.place) is not None:
                continue
            before = value = None
            if each.looks:
                before, value = places.before(each.place), self._at(each.place)
            nothing = before is NOTHING or value is NOTHING
            if nothing or each.holds is None or not each.holds(before, value, each.guard, self):
                raise NotAlike(f"{each.guard.inner_create_fn().__name__} of {each.guard.name}")

    @property
    def originals(self) -> list[Guard]:
        """The guards of the traced layer that the other one needs too."""
        plan = self._guards.plan
        return [each.guard for each in plan if each.copied and self._common[each.place] is None]

    def install(self, *, deferred: bool) -> None:
        """Guard the other layer, which has been checked. `deferred`: some when they are asked for.

        What tells runtimes apart is asked for at once.
        """
        made: list[Guard] = []
        if deferred and all(self._common_at(place) is not None for place in self._guards.active):
            defer(self)
        else:
            made += map(self.copied, self.originals)
        for source in self._alike:
            known = self._output.side_effects[self.now(source)].source
            if self.common(source) is None and (source, known) in self._guards.duplicates:
                continue  # there is a copy
            create = make_dupe_guard(self.source(source), known)
            if create is not None:
                made.append(Guard(self.source(source), create))
        for guard in self._guards.hooks:
            if keywords_of(guard)["key"] in self._hooks:
                made.append(self._copy(guard, guard.originating_source))
        install_guard(*made)
        for source in self._guards.ordered:
            if self.common(source) is None:
                self._output.guard_on_key_order.add(self.source(source))

    def copied(self, guard: Guard) -> Guard:
        """A guard of the traced layer, on the other one."""
        return self._copy(guard, self.source(guard.originating_source))

    def _copy(self, guard: Guard, source: Source) -> Guard:
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
