"""Tensors of the model that depend on no request: its own, and cached results.

A module may keep a table of biases in a dict. It depends on no request and no adapter if it existed
before compilation, or if a graph computed it only from sizes and the model's tensors without LoRA,
and as long as it is not written into.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdRef

from lorafx.ownership.memory import MemoryState, state_of, storage_of


class Remembered:
    """Storages of such tensors, with their states."""

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
        found = self._known.get(key) if (key := storage_of(tensor)) is not None else None
        if found is None or found[0].expired() or tensor.is_inference():
            return False
        return found[1] == state_of(tensor, digested=True)


def in_containers(model: nn.Module) -> Iterator[Tensor]:
    """The tensors in modules' dict, list and tuple attributes."""
    for module in model.modules():
        for value in vars(module).values():
            if value is module._parameters or value is module._buffers:
                continue
            items = value.values() if isinstance(value, Mapping) else value
            if isinstance(value, (Mapping, Sequence)) and not isinstance(value, (str, bytes)):
                yield from (item for item in items if isinstance(item, Tensor))


class TensorVersions:
    """The states, without digests, of a model's tensors at compilation."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._known = {
            id(tensor): (weakref.ref(tensor), state_of(tensor, digested=False))
            for tensor in tensors
            if not tensor.is_inference()
        }

    def unwritten(self, tensor: object) -> bool:
        """Whether this is such a tensor, unwritten since, or a parameter."""
        if isinstance(tensor, nn.Parameter):
            return True
        reference, state = self._known.get(id(tensor), (None, None))
        if reference is None or not isinstance(tensor, Tensor) or reference() is not tensor:
            return False
        return state == state_of(tensor, digested=False)


class OwnMemory:
    """Storages of parameters, buffers and constants, from `tensors` at most once a call."""

    def __init__(self, tensors: Callable[[], Iterable[Tensor]]) -> None:
        self._tensors = tensors
        self._known: dict[int, Any] = {}

    def in_one_call(self) -> Callable[[Tensor], bool]:
        """A test, for a single call, whether a tensor lies in the model's memory."""
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
        found = self._known.get(id(tensor) if key is None else key)
        if isinstance(found, StorageWeakRef):
            return not found.expired()
        return found is not None and found() is tensor


def _reference(tensor: Tensor) -> tuple[int, Any]:
    key = storage_of(tensor)
    if key is None:
        return id(tensor), WeakIdRef(tensor)
    return key, StorageWeakRef(tensor.untyped_storage())
