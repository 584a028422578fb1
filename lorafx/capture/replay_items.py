"""Items of lists that layers pick by numbers of their own, as in `cache.layers[self.layer_idx]`.

A number that a layer uses for nothing else may differ: the item that another layer picks then takes
the place of the traced one's, as that layer itself does. Dynamo guards a number where it is read.
So it is not read while the layer is traced, but the item is handed out; it is guarded at the end.
Whatever else leads to an item of the list is noted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.lazy import LazyConstantVariable, LazyVariableTracker
from torch._dynamo.variables.lists import ListVariable
from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable
from torch._dynamo.variables.user_defined import UserDefinedObjectVariable

from lorafx.capture.replay_arguments import NotAlike, plain, replayed_result
from lorafx.capture.replay_guards import Guards


class _Watched(LazyVariableTracker):
    """Stands for an item while a layer is traced, and tells when somebody looks at it."""

    _nonvar_fields = {"_item", "_known", "_watch", *LazyVariableTracker._nonvar_fields}  # noqa: RUF012

    def __init__(self, item: Any, watch: Watch) -> None:
        VariableTracker.__init__(self, source=item.source)
        self._item, self._watch = item, watch
        lazy = isinstance(item, LazyVariableTracker)
        self._known = item._cache if lazy else SimpleNamespace(vt=item)

    @property
    def _cache(self) -> Any:  # type: ignore[override]
        self._watch.note(self._item)
        return self._known

    def unwrap(self) -> Any:
        return self if self._watch.looking else super().unwrap()


@dataclass(frozen=True)
class Pick:
    """One time that a layer picked an item: Dynamo's images of the list, of the number, which has
    not been read, and of the item."""

    items: Any
    number: Any
    item: Any


class Watch:
    """The lists of objects that there are when a layer begins to be traced, and what it does with
    their items."""

    def __init__(self, tx: Any, guards: Guards, args: Any, kwargs: Any, *, watched: bool) -> None:
        self._output, self._guards = tx.output, guards
        effects = tx.output.side_effects
        given: list[Any] = [*args, *kwargs.values(), *effects.id_to_variable.values()]
        for stored in effects.store_attr_mutations.values():
            given.extend(stored.values())
        if not watched:  # those of another layer's call, which this one is in, are
            given.clear()
        found = {id(each): each for each in map(plain, given) if _holds_objects(each)}
        self._lists = {key: each for key, each in found.items() if not self._is_own(each)}
        self._items = {id(item): item for each in self._lists.values() for item in each.items}
        self._given = list(args), dict(kwargs)
        #: Items that Dynamo has not looked at yet, and the objects.
        self._unseen: list[tuple[Any, Any]] = []
        for item in self._items.values():
            if isinstance(item, LazyVariableTracker) and not item.is_realized():
                self._unseen.append((item, item.peek_value()))
        self._read: dict[int, Any] = {}
        #: While this is true, nobody else looks.
        self.looking = False
        self._ended = False
        self.picks: list[Pick] = []
        #: By item what had been stored in it when it was first picked.
        self.stored: dict[Any, dict[str, Any]] = {}

    def _is_own(self, variable: Any) -> bool:
        return variable.source is not None and self._guards.concerns(variable.source)

    def note(self, item: Any) -> None:
        """Somebody looks at an item."""
        if not self.looking and not self._ended:
            self._read[id(item)] = item

    def found(self, variable: Any) -> None:
        """Dynamo has found its image of an object by the object."""
        effects = self._output.side_effects.id_to_variable
        for item in self._items.values():
            if plain(item) is variable:
                self.note(item)
        for item, value in self._unseen:
            if effects.get(id(value)) is variable:
                self.note(item)

    @contextmanager
    def unnoted(self) -> Iterator[None]:
        self.looking = True
        try:
            yield
        finally:
            self.looking = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the layer is traced."""
        stands = {key: _Watched(item, self) for key, item in self._items.items()}
        known = self._output.variable_tracker_cache
        sources = [source for source, one in known.items() if id(one) in stands]
        try:
            for each in self._lists.values():
                each.items[:] = [stands[id(item)] for item in each.items]
            for source in sources:
                known[source] = stands[id(known[source])]
            if stands:
                self._look_around()
            yield
        finally:
            self._ended = True
            back = {id(one): one._item for one in stands.values()}
            for each in self._lists.values():
                each.items[:] = [back.get(id(item), item) for item in each.items]
            for source in sources:
                if source in known:
                    known[source] = back.get(id(known[source]), known[source])

    def _look_around(self) -> None:
        """Note the items that can be reached without the lists."""
        items = {id(plain(item)): item for item in self._items.values()}
        effects = self._output.side_effects
        others = [one for one in effects.id_to_variable.values() if id(one) not in items]
        met: dict[int, Any] = {}
        with self.unnoted():
            for value in (*self._given, list(effects.store_attr_mutations.values()), others):
                VariableTracker.visit(lambda one: met.setdefault(id(one), one), value)
        self._read.update((id(items[key]), items[key]) for key in met.keys() & items.keys())

    def pick(self, items: Any, number: Any) -> Any:
        """What stands in the list `items` at `number`; None where that is not to be handed out
        unread."""
        if not isinstance(number, LazyConstantVariable) or number.is_realized():
            return None
        place, source = number.peek_value(), number.source
        if not _is_number(place) or source is None or not self._guards.concerns(source):
            return None
        items = items.realize() if isinstance(items, LazyVariableTracker) else items
        if id(items) not in self._lists or not 0 <= place < len(items.items):
            return None
        item = items.items[place]
        if not isinstance(item, _Watched) or item._watch is not self:
            return None
        item = item._item
        effects = self._output.side_effects
        for one, value in self._unseen:
            if one is item and not one.is_realized() and value in effects:
                self.note(item)  # Dynamo knows the object from somewhere else
        item = item.realize() if isinstance(item, LazyVariableTracker) else item
        self.stored.setdefault(item, dict(effects.store_attr_mutations.get(item, {})))
        self.picks.append(Pick(items, number, item))
        return item

    def end(self) -> None:
        """The layer has been traced.

        Raises:
            NotAlike: it came upon an item that it picked in another way too.
        """
        effects = self._output.side_effects
        for item, value in self._unseen:
            if value in effects and plain(item) not in self.stored:
                self._read[id(item)] = item
        if any(plain(item) in self.stored for item in self._read.values()):
            raise NotAlike("an item of a list is reached in two ways")

    def apart(self) -> dict[int, Any]:
        """The items that the layer did not look at, or only as those it picked, by identity."""
        found = {id(one): one for one in map(plain, self._items.values())}
        for item in self._read.values():
            found.pop(id(plain(item)), None)
        return found

    def attributes(self, others: Mapping[Any, Any] | None = None) -> dict[Any, Any]:
        """What had been stored in the items when the layer picked them, or is in those that another
        one picks instead, as arguments of it."""
        now = self._output.side_effects.store_attr_mutations
        return {
            (place, name): value
            for place, (item, before) in enumerate(self.stored.items())
            for name, value in (before if others is None else now.get(others[item], {})).items()
        }

    def picked_by(self, number: Callable[[Any], Any]) -> dict[Any, Any]:
        """By the items that the layer picked those that another one picks, of which `number` tells
        what it has at a source.

        Raises:
            NotAlike: it picks items of another kind, or the layer came upon one of them.
        """
        found: dict[Any, Any] = {}
        back: dict[Any, Any] = {}
        for pick in self.picks:
            place = number(pick.number.source)
            if not _is_number(place) or not 0 <= place < len(pick.items.items):
                raise NotAlike(f"{pick.number.source.name} is no place in the list")
            item = pick.items.items[place]
            item = item.realize() if isinstance(item, LazyVariableTracker) else item
            kinds = [(type(each), each.python_type()) for each in (item, pick.item)]
            if kinds[0] != kinds[1]:
                raise NotAlike("an item is of another class")
            if found.setdefault(pick.item, item) is not item:
                raise NotAlike("an item is reached in two ways")
            if back.setdefault(item, pick.item) is not pick.item:
                raise NotAlike("two items are one")
        apart = self.apart() if found else {}
        if any(id(item) not in apart for item in found.values()):
            raise NotAlike("an item is reached in two ways")
        return found


@dataclass(frozen=True)
class Store:
    """What a layer stored last in an attribute of an item that it picked."""

    item: Any
    name: str
    value: Any
    kind: tuple[Any, ...]


def stores_of(
    effects: Any, items: Iterable[Any], names: Iterable[tuple[Any, str | None]]
) -> list[Store]:
    """What has been stored in the items since they were picked, in order."""
    kinds = getattr(effects, "attr_mutation_kinds", {})  # before torch 2.12 there is one
    found = []
    for item in items:
        for name in dict.fromkeys(name for one, name in names if one is item and name):
            kind = (kinds[item][name],) if name in kinds.get(item, {}) else ()
            found.append(Store(item, name, effects.store_attr_mutations[item][name], kind))
    return found


def store(
    stores: Sequence[Store], items: Mapping[Any, Any], variables: Mapping[Any, Any], effects: Any
) -> None:
    """Store in other items what a layer stored in those that it picked."""
    stored = effects.store_attr_mutations
    before = {item: dict(stored[item]) if item in stored else None for item in items.values()}
    try:
        for each in stores:
            value = replayed_result(each.value, variables)
            effects.store_attr(items[each.item], each.name, value, *each.kind)
    except BaseException:  # the layer is traced, and finds the item as it was
        for item, attributes in before.items():
            stored.pop(item, None)
            if attributes is not None:
                stored[item] = attributes
        raise


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _holds_objects(variable: Any) -> bool:
    if isinstance(variable, LazyVariableTracker) or not isinstance(variable, ListVariable):
        return False
    return bool(variable.items) and all(map(_is_object, variable.items))


def _is_object(item: Any) -> bool:
    item = plain(item)
    if isinstance(item, LazyVariableTracker):
        return not isinstance(item, (LazyConstantVariable, _Watched)) and _may_be_object(
            item.peek_value()
        )
    return isinstance(item, UserDefinedObjectVariable) and not isinstance(
        item, UnspecializedNNModuleVariable
    )


def _may_be_object(value: Any) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, (Tensor, nn.Module, type))
