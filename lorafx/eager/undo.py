"""What an eager forward changes outside of itself, to be as before if a graph must serve the call.

Caches among the arguments change as Python objects, and tensors from before the call are written in
place. Both are recorded before they change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping, MutableSequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

#: Objects that a forward does not change.
_FIXED = (Tensor, nn.Module, str, bytes, int, float, complex, torch.dtype, torch.device, type)


class Undo:
    """The state before a call.

    Args:
        arguments: of the call; the objects in them are looked through, but for modules and tensors.
        device: the model's.
    """

    def __init__(self, arguments: Iterable[Any], device: torch.device) -> None:
        self._contents: list[tuple[Any, Any]] = []
        self._restore: list[Callable[[], object]] = []
        if device.type == "cuda":
            state = torch.cuda.get_rng_state(device)
            self._restore.append(partial(torch.cuda.set_rng_state, state, device))
        self._restore.append(partial(torch.set_rng_state, torch.get_rng_state()))
        seen: set[int] = set()
        for argument in arguments:
            self._record(argument, seen)

    def _record(self, value: Any, seen: set[int]) -> None:
        if value is None or isinstance(value, _FIXED) or callable(value) or id(value) in seen:
            return
        seen.add(id(value))
        held: Any = value if isinstance(value, _CONTAINERS) else getattr(value, "__dict__", None)
        if isinstance(held, MutableMapping):
            self._contents.append((held, dict(held)))
            inner: Iterable[Any] = held.values()
        elif isinstance(held, MutableSequence):
            self._contents.append((held, list(held)))
            inner = held
        elif isinstance(held, tuple):
            inner = held
        else:
            return
        for item in inner:
            self._record(item, seen)

    def note(self, tensors: Iterable[Tensor]) -> None:
        """These tensors from before the call are about to be written."""
        self._restore += [partial(tensor.copy_, tensor.clone()) for tensor in tensors]

    def note_rows(self, tables: Iterable[tuple[Tensor, Tensor]]) -> None:
        """These rows of tables from before the call are about to be written."""
        for table, rows in tables:
            before = table.index_select(0, rows)
            self._restore.append(partial(table.index_copy_, 0, rows, before))

    @torch.no_grad()
    def run(self) -> None:
        """Make everything as it was before the call."""
        while self._restore:
            self._restore.pop()()
        for held, before in self._contents:
            if isinstance(held, MutableMapping):
                held.clear()
                held.update(before)
            else:
                held[:] = before


_CONTAINERS = (MutableMapping, MutableSequence, tuple)
