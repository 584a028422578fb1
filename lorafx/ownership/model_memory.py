"""Tensors that modules, hooks and functions of a model keep, and what was written into them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdRef

from lorafx.ownership.memory import MemoryState, elements_of, state_of, storage_of

#: The most items of a container that `in_code` looks at.
_MOST_ITEMS = 4096


class Remembered:
    """Storages of a model's tensors that depend on no request but are no parameters or buffers,
    such as a table of biases in a dict, with their states.

    Such a tensor existed before compilation, or a graph computed it only from sizes and tensors
    without LoRA. It is forgotten once it is written into.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[StorageWeakRef, MemoryState]] = {}

    def keep(self, tensors: Iterable[Tensor]) -> None:
        self._known = {k: item for k, item in self._known.items() if not item[0].expired()}
        for tensor in tensors:
            key = storage_of(tensor)
            if key is not None and not tensor.is_inference():
                reference = StorageWeakRef(tensor.untyped_storage())
                self._known[key] = reference, state_of(tensor, digested=True)

    def holds(self, tensor: Tensor) -> bool:
        item = self._known.get(key) if (key := storage_of(tensor)) is not None else None
        if item is None or item[0].expired() or tensor.is_inference():
            return False
        return item[1] == state_of(tensor, digested=True)


def in_containers(model: nn.Module) -> Iterator[Tensor]:
    """The tensors in modules' dict, list and tuple attributes."""
    for module in model.modules():
        for value in vars(module).values():
            if value is module._parameters or value is module._buffers:
                continue
            items = value.values() if isinstance(value, Mapping) else value
            if isinstance(value, (Mapping, Sequence)) and not isinstance(value, (str, bytes)):
                yield from (item for item in items if isinstance(item, Tensor))


def in_code(value: object, seen: set[int], depth: int = 5) -> Iterator[Tensor]:
    """Parameters, and vectors that are no views, which a hook holds in closures, globals, arguments
    and attributes: the same for all rows, if they existed when it was registered."""
    if id(value) in seen or not depth:
        return
    seen.add(id(value))
    items: Iterable[object] = ()
    if isinstance(value, Tensor):
        vector = value.numel() == max(value.shape, default=1)
        if isinstance(value, nn.Parameter) or (vector and elements_of(value) == value.numel()):
            yield value
    elif isinstance(value, nn.Module):
        items = (*value.parameters(), *value.buffers())
    elif isinstance(value, (Mapping, list, tuple)):
        items = value.values() if isinstance(value, Mapping) else value
    elif isinstance(value, partial):
        items = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        items = (value.__self__, value.__func__)
    elif isinstance(value, FunctionType):
        used = map(value.__globals__.get, value.__code__.co_names)
        with suppress(ValueError):  # a cell may be empty
            items = [cell.cell_contents for cell in value.__closure__ or ()]
        items = (*items, *used, *(value.__defaults__ or ()))
    elif not isinstance(value, (type, ModuleType)):
        items = getattr(value, "__dict__", {}).values()
    for item in islice(items, _MOST_ITEMS):
        yield from in_code(item, seen, depth - 1)


class TensorVersions:
    """The states, without digests, of a model's tensors at compilation."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._known = {
            id(tensor): (weakref.ref(tensor), state_of(tensor, digested=False))
            for tensor in tensors
            if not tensor.is_inference() and storage_of(tensor) is not None
        }

    def unwritten(self, tensor: object) -> bool:
        """Whether `tensor` is a parameter, or one of these that was not written into since."""
        if isinstance(tensor, nn.Parameter):
            return True
        reference, state = self._known.get(id(tensor), (None, None))
        if reference is None or not isinstance(tensor, Tensor) or reference() is not tensor:
            return False
        return state == state_of(tensor, digested=False)


class ModelMemory:
    """Storages of a model's parameters, buffers and constants, read at most once a call."""

    def __init__(self, tensors: Callable[[], Iterable[Tensor]]) -> None:
        self._tensors = tensors
        self._known: dict[int, Any] = {}

    def in_one_call(self) -> Callable[[Tensor], bool]:
        """A predicate that is valid for one call: whether a tensor is in the model's memory."""
        looked = False

        def holds(tensor: Tensor) -> bool:
            nonlocal looked
            if not self._holds(tensor) and not looked:
                looked = True
                self._known = dict(map(_reference, self._tensors()))
            return self._holds(tensor)

        return holds

    def _holds(self, tensor: Tensor) -> bool:
        key = storage_of(tensor)
        reference = self._known.get(id(tensor) if key is None else key)
        if isinstance(reference, StorageWeakRef):
            return not reference.expired()
        return reference is not None and reference() is tensor


def _reference(tensor: Tensor) -> tuple[int, Any]:
    key = storage_of(tensor)
    if key is None:
        return id(tensor), WeakIdRef(tensor)
    return key, StorageWeakRef(tensor.untyped_storage())
