"""What an eager forward changes outside of itself, to be as before if a graph must serve the call.

Python's objects are recorded before the call: its arguments, the model's modules, all that these
hold, and the states of random numbers. Tensors from before the call are recorded when they are
about to be written.

What globals and classes hold is left alone, and so are objects of torch, of Python's own packages
and of lorafx, except for containers, modules and sources of random numbers.
"""

from __future__ import annotations

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache, partial
from itertools import islice
from operator import is_not
from types import CellType, FunctionType, MemberDescriptorType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.ownership.memory import Geometry, geometry_of, storage_of

#: Records an object, and returns those that it holds.
_Look = Callable[["Undo", Any], Iterable[Any]]

#: `type`, of whose results mypy does not know that they are hashable.
class_of: Callable[[object], Any] = type
#: The most objects that are looked at, and the largest array of numpy that is copied, in bytes.
_MOST_OBJECTS, _LARGEST_ARRAY = 100_000, 1 << 20


class Undo:
    """The state before a call.

    Args:
        holders: the call's arguments, and its modules; all that they hold is recorded, too.
        device: the model's.
        trusted: no code writes attributes of torch's own modules.
    """

    def __init__(
        self, holders: Iterable[Any], device: torch.device, *, trusted: bool = False
    ) -> None:
        self._restore: list[Callable[[], object]] = []
        # Two lists: a tuple for each would be more for Python's collector to look at.
        self._held, self._before = list[Any](), list[Any]()
        if device.type == "cuda":
            self.to_restore(torch.cuda.set_rng_state, torch.cuda.get_rng_state(device), device)
        self.to_restore(torch.set_rng_state, torch.get_rng_state())
        self.to_restore(random.setstate, random.getstate())
        numpy: Any = sys.modules.get("numpy.random")
        if numpy is not None:
            self.to_restore(numpy.set_state, numpy.get_state())
        self._trusted, self._seen = trusted, set[int]()
        self.record(holders)

    def record(self, holders: Iterable[Any]) -> None:
        """Record these objects, and all that they hold, too."""
        waiting, seen, trusted = list(holders), self._seen, self._trusted
        while waiting and len(seen) < _MOST_OBJECTS:
            value = waiting.pop()
            look = _look_at(class_of(value))
            if look is None or id(value) in seen:
                continue
            if trusted and _is_torchs(value):
                _hooks(self, value)
                continue
            seen.add(id(value))
            waiting += [part for part in look(self, value) if _look_at(class_of(part)) is not None]

    def exchange(self, exchanged: Callable[[Any], Any]) -> None:
        """Put what `exchanged` returns into all dicts, lists and attributes recorded so far."""
        for held, before in zip(self._held, self._before, strict=True):
            pairs = before.items() if isinstance(before, dict) else enumerate(before)
            for place, value in () if isinstance(held, set) else pairs:
                if (other := exchanged(value)) is not value:
                    _base(held).__setitem__(held, place, other)

    def note(self, tensors: Iterable[Tensor]) -> None:
        """These tensors from before the call are about to be written."""
        for tensor in tensors:
            place = None
            if storage_of(tensor) is not None:
                place = tensor.untyped_storage(), geometry_of(tensor)
            self.to_restore(_write_back, tensor, tensor.clone(), place)

    def note_rows(self, tables: Iterable[tuple[Tensor, Tensor]]) -> None:
        """These rows of tables from before the call are about to be written."""
        for table, rows in tables:
            before = table.index_select(0, rows)
            self._restore.append(partial(table.index_copy_, 0, rows, before))

    def to_refill(self, held: Any, before: Any) -> None:
        """Note that a container has these contents."""
        self._held.append(held)
        self._before.append(before)

    def to_restore(self, action: Callable[..., object], *args: Any) -> None:
        """Note a call that restores something."""
        self._restore.append(partial(action, *args))

    @torch.no_grad()
    def run(self) -> None:
        """Make everything as it was before the call."""
        while self._restore:
            self._restore.pop()()
        while self._held:
            _refill(self._held.pop(), self._before.pop())


# --- how objects are recorded ---


@lru_cache(1024)
def _look_at(cls: Any) -> _Look | None:
    """How instances of a class are recorded; None for those that a forward does not change."""
    for classes, look in (*_LOOKS, *_looks_of_numpy()):
        if issubclass(cls, classes):
            return look
    return None if str(cls.__module__).partition(".")[0] in _LEFT_ALONE else _object


def _is_torchs(value: object) -> bool:
    """Whether this is a module without parts whose forward is torch's."""
    is_part = isinstance(value, nn.Module) and not value._modules
    return is_part and _has_torchs_forward(class_of(value))


@lru_cache(1024)
def _has_torchs_forward(cls: Any) -> bool:
    return str(cls.forward.__module__).partition(".")[0] == "torch"


def _module(undo: Undo, value: nn.Module) -> Iterable[Any]:
    attributes = vars(value)
    for table in (attributes, value._buffers, value._parameters, value._modules):
        if isinstance(table, dict):  # torch.jit's modules hold theirs in C++
            undo.to_refill(table, table.copy() if table else _NOTHING)
    _hooks(undo, value)
    first = len(_OF_TORCH) if tuple(islice(attributes, len(_OF_TORCH))) == _OF_TORCH else 0
    parts = [*islice(attributes.values(), first, None)]
    for held in (value._modules, value._forward_hooks, value._forward_pre_hooks):
        if held:
            parts += held.values()
    return parts


def _hooks(undo: Undo, value: nn.Module) -> None:
    """Those of forwards: transformers, say, registers some in the call that first needs them."""
    for held in (value._forward_hooks, value._forward_pre_hooks):
        undo.to_refill(held, held.copy() if held else _NOTHING)


def _container(undo: Undo, value: Any) -> Iterable[Any]:
    """A dict, list, set or deque, or one of a subclass, which may have attributes."""
    before = dict(_base(value).items(value)) if isinstance(value, dict) else list(value)
    undo.to_refill(value, before)
    return [*(before.values() if isinstance(before, dict) else before), *_object(undo, value)]


def _object(undo: Undo, value: Any) -> Iterable[Any]:
    attributes: dict[str, Any] = getattr(value, "__dict__", _NOTHING)
    if attributes is not _NOTHING:
        undo.to_refill(attributes, attributes.copy())
    slots = [slot for slot in _slots(class_of(value)) if hasattr(value, slot.__name__)]
    held = [slot.__get__(value) for slot in slots]
    for slot, item in zip(slots, held, strict=True):
        undo.to_restore(slot.__set__, value, item)
    return [*attributes.values(), *held]


def _cell(undo: Undo, value: CellType) -> Iterable[Any]:
    with suppress(ValueError):  # it is empty
        undo.to_restore(setattr, value, "cell_contents", value.cell_contents)
        return (value.cell_contents,)
    return ()


def _generator(undo: Undo, value: Any) -> Iterable[Any]:
    undo.to_restore(value.set_state, value.get_state())
    return ()


def _random(undo: Undo, value: random.Random) -> Iterable[Any]:
    undo.to_restore(value.setstate, value.getstate())
    return ()


def _array(undo: Undo, value: Any) -> Iterable[Any]:
    if value.nbytes <= _LARGEST_ARRAY:
        undo.to_restore(value.__setitem__, ..., value.copy())
    return ()


def _bits(undo: Undo, value: Any) -> Iterable[Any]:
    undo.to_restore(setattr, value, "state", value.state)
    return ()


def _looks_of_numpy() -> tuple[tuple[type, _Look], ...]:
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        return ()
    return (
        (numpy.ndarray, _array),
        (numpy.random.BitGenerator, _bits),
        (numpy.random.Generator, lambda _, value: (value.bit_generator,)),
        (numpy.random.RandomState, _generator),
    )


#: Of a class and its subclasses; the first that fits counts.
_LOOKS: tuple[tuple[Any, _Look | None], ...] = (
    ((Tensor, type), None),
    (nn.Module, _module),
    ((dict, list, set, deque), _container),
    ((tuple, frozenset), lambda _, value: value),
    (FunctionType, lambda _, value: value.__closure__ or ()),
    (CellType, _cell),
    (MethodType, lambda _, value: (value.__self__,)),
    (partial, lambda _, value: (value.func, value.args, value.keywords)),
    (torch.Generator, _generator),
    (random.Random, _random),
)
#: Packages with objects that other threads change, or lorafx itself.
_LEFT_ALONE = sys.stdlib_module_names | {"torch", "lorafx"}
#: What nn.Module itself gives a module, before others.
_OF_TORCH = tuple(vars(nn.Module()))
_NOTHING: dict[str, Any] = {}


@lru_cache(1024)
def _slots(cls: type) -> tuple[MemberDescriptorType, ...]:
    classes = [vars(base) for base in cls.__mro__ if "__slots__" in vars(base)]
    held = (value for names in classes for value in names.values())
    return tuple(value for value in held if isinstance(value, MemberDescriptorType))


def _write_back(
    tensor: Tensor, before: Tensor, place: tuple[torch.UntypedStorage, Geometry] | None
) -> None:
    if place is not None:
        storage, (size, stride, offset) = place
        if tensor.untyped_storage()._cdata != storage._cdata:  # after `set_`
            tensor.set_(storage, offset, size, stride)
        elif geometry_of(tensor) != place[1]:  # such as after `t_`
            tensor.as_strided_(size, stride, offset)
    if place is None or not torch.equal(tensor, before):  # a write counts as a change
        tensor.copy_(before)


def _base(value: Any) -> Any:
    """The container that a subclass, such as transformers' ModelOutput, has its contents from."""
    return next(base for base in (OrderedDict, dict, list, set, deque) if isinstance(value, base))


def _refill(held: Any, before: Any) -> None:
    """Give a container back its contents, a dict or a list, if they have changed."""
    base, pairs = _base(held), isinstance(before, dict)
    then = [*before, *before.values()] if pairs else before
    now = [*base.keys(held), *base.values(held)] if pairs else [*held]
    if len(now) == len(then) and not any(map(is_not, now, then)):
        return
    base.clear(held)
    if pairs:
        for key, item in before.items():
            base.__setitem__(held, key, item)
    else:
        (base.update if base is set else base.extend)(held, before)
