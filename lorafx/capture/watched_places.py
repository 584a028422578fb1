"""Places of a model that guards of a graph compare, looked at again only if a dictionary changes.

Each step to such a place, from the model or a global, is a look-up in a dictionary:

    self  ._modules ['model']  ._parameters ['weight']        {_modules: …} {model: …} {weight: …}

Dynamo takes all steps before each call. Here a call compares the versions of the dictionaries,
which CPython counts up with each change, and looks at all places once one has changed. What can
change without a dictionary is compared in each call: the classes of modules, and the dtypes, sizes,
strides and devices of parameters.
"""

from __future__ import annotations

import inspect
import operator
import re
import weakref
from ast import literal_eval
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

from lorafx.torch_internals.dynamo import dict_version, form_guards
from lorafx.torch_internals.frames import guard_argument, source_text

#: The kind of the guard that stands for the others.
KIND = "WATCHED_PLACES"
_IDENTITY = frozenset(
    (
        *("ID_MATCH", "TYPE_MATCH", "CLASS_MATCH", "MODULE_MATCH", "CLOSURE_MATCH"),
        *("FUNCTION_MATCH", "BUILTIN_MATCH", "NN_MODULE", "NOT_NONE_MATCH"),
    )
)
_KEYS = frozenset(("SEQUENCE_LENGTH", "DICT_KEYS_MATCH", "DICT_CONTAINS", "DICT_NOT_CONTAINS"))
_VALUE = frozenset(("CONSTANT_MATCH", "EQUALS_MATCH", "BOOL_MATCH", "NONE_MATCH"))
_CONSTANTS = (type(None), bool, int, float, complex, str, bytes)
#: Exactly these: look-ups in a subclass may be others.
_DICTIONARIES = (dict, OrderedDict)
_GLOBAL = re.compile(r"G\['(\w+)'\]")
_MISSING = object()


class Place(NamedTuple):
    """A key of a dictionary, and what is there; `_MISSING` if the key must not be."""

    table: dict[Any, Any]
    key: Any
    value: Any

    def is_same(self) -> bool:
        value, known = self.table.get(self.key, _MISSING), self.value
        if value is known or type(value) is not type(known):
            return value is known
        # Of another tensor its form is compared, here or by Dynamo.
        return isinstance(known, Tensor) or (
            _is_constant(known)
            and _is_constant(value)
            and repr(value) == repr(known)  # 1 is not True
        )


class Reached(NamedTuple):
    """A value, and the places on the way to it."""

    value: Any
    way: tuple[Place, ...] = ()


class WatchedPlaces:
    """Places of a frame with this `self`, from which some are reached if it is a module. `ordered`
    are the places of dictionaries over which the frame iterates."""

    def __init__(self, owner: Any, f_globals: dict[str, Any], ordered: Collection[Any]) -> None:
        self._model = owner if isinstance(owner, nn.Module) else None
        self._globals, self._ordered = f_globals, ordered
        self._reached: dict[str, Reached | None] = {}
        self._places: dict[tuple[int, Any], Place] = {}
        self._texts: dict[tuple[int, Any], str] = {}  # of places
        #: Dictionaries whose keys are compared too, in their order.
        self._keys: dict[int, tuple[dict[Any, Any], list[Any]]] = {}
        self._modules: dict[int, Any] = {}
        #: Where tensors are whose forms are compared, and what is there now.
        self._tensors: dict[int, tuple[dict[Any, Any], Any]] = {}
        self._present: list[Any] = []
        #: The guards that it stands for.
        self.guards: list[Any] = []

    def watch(self, guards: Iterable[Any]) -> None:
        """Stand for those of Dynamo's `Guard`s that places in dictionaries can stand for."""
        for guard in guards:
            places = self._places_of(guard)
            if places is not None:
                found = {(id(place.table), place.key): place for place in places}
                self._places |= found
                self._texts |= dict.fromkeys(found, source_text(guard.originating_source))
                self.guards.append(guard)
        self._reached.clear()
        tables = {key: table for key, (table, _) in self._keys.items()}
        tables |= {id(place.table): place.table for place in self._places.values()}
        self._tables = list(tables.values())
        self._versions = [*map(dict_version, self._tables)]
        self._classes = [*map(type, self._modules.values())]
        self._present = [table[key] for table, key in self._tensors.values()]
        self._forms = form_guards(self._present)

    def guard(self, add: Callable[[Callable[[Any], bool]], None]) -> None:
        """`add` a guard on these places. It has a weak reference: Dynamo never frees some."""
        weak = weakref.ref(self)

        def holds(f_locals: Any) -> bool:
            places = weak()
            return places is not None and places.serves(f_locals) and places.holds()

        add(holds)

    def serves(self, f_locals: Any) -> bool:
        return self._model is None or f_locals["self"] is self._model

    def holds(self) -> bool:
        """Whether all places are as they were."""
        versions = [*map(dict_version, self._tables)]
        if versions != self._versions:
            if any(list(table) != keys for table, keys in self._keys.values()) or not all(
                place.is_same() for place in self._places.values()
            ):
                return False
            # Tensors and equal constants may be others now, and those before need not be kept.
            for key, (table, name, _) in self._places.items():
                self._places[key] = Place(table, name, table.get(name, _MISSING))
            self._versions = versions
            self._present = [table[key] for table, key in self._tensors.values()]
        classes = map(type, self._modules.values())
        return all(map(operator.is_, classes, self._classes)) and bool(
            self._forms.check(*self._present)
        )

    def change(self) -> str:
        """The first place that is not as it was, as Dynamo writes guards; "" if there is none."""
        changed = (key for key, place in self._places.items() if not place.is_same())
        key = next(changed, None)
        if key is None:
            return ""
        known = self._places[key].value
        return self._texts[key] + (f" == {known!r}" if _is_constant(known) else "")

    def _places_of(self, guard: Any) -> tuple[Place, ...] | None:
        """What to compare in the place of a guard; None if that is not enough."""
        kind, argument = guard.create_fn_name(), guard_argument(guard)
        reached = self._reach(guard.originating_source)
        if reached is None:
            return None
        value, way = reached
        if type(value) in _DICTIONARIES and kind in _KEYS:
            self._keys[id(value)] = value, list(value)
            return way
        at_end = bool(way) and way[-1].value is value
        if (
            kind == "TENSOR_MATCH"
            and at_end
            and self._is_of_parameter(guard.originating_source, value)
        ):
            self._tensors.setdefault(id(value), way[-1][:2])
            return way
        if isinstance(value, Tensor) and kind not in ("TYPE_MATCH", "NOT_NONE_MATCH"):
            return None
        if kind in _IDENTITY and type(value) not in (int, float):  # whose type alone may matter
            if isinstance(value, nn.Module):
                self._modules[id(value)] = value
            return way
        if kind in _VALUE and _is_constant(value):
            return way
        if kind == "NOT_PRESENT_IN_GENERIC_DICT" and argument not in vars(value):
            return *way, Place(vars(value), argument, _MISSING)
        other = None
        if kind == "DUPLICATE_INPUT":
            other = self._reach(argument)
        elif kind == "HASATTR":
            other = _attribute(value, argument)
        return None if other is None else way + other.way

    def _is_of_parameter(self, source: Any, value: Any) -> bool:
        """Whether this is a parameter, or a tensor that one wraps: their sizes are no symbols."""
        above = getattr(source, "base", None)
        outer = None if above is None else self._reach(above)
        return isinstance(value, nn.Parameter) or (
            isinstance(value, Tensor)
            and outer is not None
            and isinstance(outer.value, nn.Parameter)
        )

    def _reach(self, source: Any) -> Reached | None:
        text = source_text(source)
        if text not in self._reached:
            reached = self._reached[text] = self._take_step(source, text)
            if reached and isinstance(reached.value, dict) and source in self._ordered:
                self._keys[id(reached.value)] = reached.value, list(reached.value)
        return self._reached[text]

    def _take_step(self, source: Any, text: str) -> Reached | None:
        base = getattr(source, "base", None)
        if base is None:
            if text == "L['self']":
                return None if self._model is None else Reached(self._model)
            name = _GLOBAL.fullmatch(text)
            return None if name is None else _item(self._globals, name[1])
        above, before = self._reach(base), source_text(base)
        if above is None or not text.startswith(before):
            return None
        step, found = text[len(before) :], None
        if not step:  # another kind of source for the same place
            return above
        if step[0] == ".":
            found = _attribute(above.value, step[1:])
        elif step[0] == "[":
            try:
                found = _item(above.value, literal_eval(step[1:-1]))
            except (ValueError, SyntaxError):  # not a literal
                return None
        return None if found is None else Reached(found.value, above.way + found.way)


def _is_constant(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_constant, value))
    return type(value) in _CONSTANTS


def _item(container: Any, key: Any) -> Reached | None:
    if type(container) in _DICTIONARIES and key in container:
        return Reached(container[key], (Place(container, key, container[key]),))
    return Reached(container[key]) if type(container) is tuple else None


def _attribute(owner: Any, name: str) -> Reached | None:
    """An attribute that an object itself has, not its class; or a module's parameter, buffer or
    child."""
    kind = type(owner)
    table = getattr(owner, "__dict__", None)
    plain = kind.__getattribute__ in (object.__getattribute__, ModuleType.__getattribute__)
    if type(table) is not dict or not plain:
        return None
    if name == "__dict__":
        return Reached(table)
    shared = inspect.getattr_static(kind, name, _MISSING)
    if name in table:
        return None if hasattr(shared, "__set__") else _item(table, name)
    if shared is not _MISSING or not isinstance(owner, nn.Module):
        return None
    if kind.__getattr__ is not nn.Module.__getattr__:
        return None
    for group in ("_parameters", "_buffers", "_modules"):
        found = _item(table.get(group), name)
        if found is not None:
            above = Place(table, name, _MISSING), Place(table, group, table[group])
            return Reached(found.value, above + found.way)
    return None
