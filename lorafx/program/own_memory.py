"""The memory of a model's own tensors, which depends on no request."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdRef

from lorafx.ownership.memory import storage_of


class OwnMemory:
    """Storages of parameters, buffers and constants.

    Args:
        tensors: what the model holds now. Walks the modules, so it is asked at most once per call,
            where a tensor is met that was not there before.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]]) -> None:
        self._tensors = tensors
        self._known: dict[int, Any] = {}

    def in_one_call(self) -> Callable[[Tensor], bool]:
        """Whether a tensor lies in the model's memory; for one call."""
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
    """By storage; a tensor that is made of others by itself."""
    key = storage_of(tensor)
    if key is None:
        return id(tensor), WeakIdRef(tensor)
    return key, StorageWeakRef(tensor.untyped_storage())
