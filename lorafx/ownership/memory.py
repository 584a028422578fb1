"""Owners of memory: labels of real tensors, kept by storage.

Labels are kept by view, and spread over cells, one for each element of the storage, for views
without a label. Memory that was written unseen loses its labels, which its state reveals:

    version     counts the writes that torch sees
    open        torch has given the memory out as a numpy array, which may be written into
    digest      of all its bytes, for writers that have its address (DLPack, an extension)

    digest = Σ mix(w_i · (2 i + 1) · P)  mod 2⁶⁴        mix(x) = (x ^ (x >> 29)) · Q

over words w of 64 bits.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdRef

from lorafx.ownership.held import (
    SHARED,
    UNKNOWN,
    Alone,
    Held,
    Listed,
    Patchy,
    Shared,
    cells_of,
    held_by,
    renamed,
    renamed_cells,
)
from lorafx.torch_internals.subclasses import is_traceable_wrapper_subclass

#: sizes, strides, offset
Geometry: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], int]


@dataclass(eq=False)
class _Block:
    """The labels of a storage; none ever again once it is `handed` out."""

    ref: StorageWeakRef
    state: MemoryState
    itemsize: int
    handed: bool = False
    views: dict[Geometry, Held | None] = field(default_factory=dict)
    #: (elements of the storage,) int16, made for views without a label.
    cells: Tensor | None = None


class Memory:
    """Labels of the tensors of a call.

    Args:
        shared: whether a tensor is the model's, which depends on no request.
        guarded: whether requests differ, so that unseen writes must be found.

    Attributes:
        unseen: a tensor was handed to numpy, or written by untracked code.
    """

    def __init__(
        self,
        shared: Callable[[Tensor], bool] | None = None,
        guarded: Callable[[], bool] = lambda: True,
    ) -> None:
        self._shared, self._guarded = shared, guarded
        self._blocks: dict[int, _Block] = {}
        self.unseen = False

    def look(self, tensor: Tensor) -> Held | None:
        """The current label of a tensor; None for unknown owners."""
        if not tensor.numel():
            return SHARED
        block = self._block(tensor)
        if block is None:
            return SHARED if self._shared is not None and self._shared(tensor) else None
        if not self._intact(block, tensor):
            return None
        place = _place(tensor)
        if place not in block.views:
            block.views[place] = self._seen(block, tensor, place)
        return block.views[place]

    def computed(self, tensor: Tensor) -> bool:
        """Whether `tensor` is of the call, and was not written unseen."""
        block = self._block(tensor)
        return block is not None and self._intact(block, tensor)

    def own(self, tensors: Iterable[Tensor]) -> None:
        """Label new memory as touched by no request."""
        for tensor in tensors:
            if self._block(tensor) is None and (block := self._new(tensor)) is not None:
                block.views[(_elements(tensor),), (1,), 0] = SHARED

    def given(self, tensor: Tensor, held: Held | None) -> None:
        block = self._block(tensor) or self._new(tensor)
        if block is not None:
            block.views[_place(tensor)] = held

    def note(self, tensor: Tensor, held: Held | None, inputs: Iterable[Tensor] = ()) -> None:
        """Label a result of `inputs`, or a view of one."""
        key, block = storage_of(tensor), self._block(tensor)
        if key is None or all(storage_of(item) != key for item in inputs):
            block = self._new(tensor)
        elif held is None or block is None or not self._intact(block, tensor):
            return
        if block is not None:
            block.views[_place(tensor)] = held

    def write(self, tensor: Tensor, held: Held | None, *, uncounted: int = 0) -> None:
        """Label a written tensor, whose version lacks the last `uncounted` writes."""
        block, place = self._block(tensor), _place(tensor)
        if block is not None and block.handed:
            return
        counts = not tensor.is_inference()
        if not counts or block is None or block.itemsize != tensor.element_size():
            known = block is None and self._shared is not None and self._shared(tensor)
            block = self._new(tensor)
            if block is None:
                return
            if known:
                block.views[(_elements(tensor),), (1,), 0] = SHARED
        if block.cells is not None or (block.views and set(block.views) != {place}):
            cells = self._cells(block, tensor)
            if _spread(cells, held, place):
                block.views.clear()
            else:
                cells.fill_(UNKNOWN)
                block.views.clear()
        block.views[place] = held
        state = self._state(tensor)
        block.state = state._replace(version=state.version + uncounted)

    def rename(self, requests: Mapping[int, int]) -> None:
        if not requests:
            return
        for block in self._blocks.values():
            block.views = {place: renamed(held, requests) for place, held in block.views.items()}
            if block.cells is not None:
                block.cells = renamed_cells(block.cells, requests)

    def _new(self, tensor: Tensor) -> _Block | None:
        key = storage_of(tensor)
        if key is None:
            return None
        self._blocks.pop(key, None)
        if tensor.is_inference():  # its writes are not counted
            return None
        ref = StorageWeakRef(tensor.untyped_storage())
        block = self._blocks[key] = _Block(ref, self._state(tensor), tensor.element_size())
        return block

    def _state(self, tensor: Tensor) -> MemoryState:
        return state_of(tensor, digested=self._guarded())

    def _intact(self, block: _Block, tensor: Tensor) -> bool:
        """Whether the memory is as labelled; otherwise its labels are dropped."""
        if tensor.is_inference() or block.handed:
            return False
        now = state_of(tensor, digested=block.state.digest is not None)
        if now == block.state:
            return block.itemsize == tensor.element_size()
        self.unseen, block.handed = True, now.open != block.state.open
        block.views, block.cells = {}, None
        return False

    def _block(self, tensor: Tensor) -> _Block | None:
        key = storage_of(tensor)
        block = None if key is None else self._blocks.get(key)
        return None if block is None or block.ref.expired() else block

    def _seen(self, block: _Block, tensor: Tensor, place: Geometry) -> Held | None:
        elements = _elements(tensor)
        for (size, stride, offset), held in block.views.items():
            everything = not offset and math.prod(size) == elements and _apart(size, stride)
            if everything and isinstance(held, (Shared, Alone)):
                return held
        cells = self._cells(block, tensor)
        return held_by(cells.as_strided(*place))

    def _cells(self, block: _Block, tensor: Tensor) -> Tensor:
        if block.cells is None:
            elements = _elements(tensor)
            cells = torch.full((elements,), UNKNOWN, dtype=torch.int16, device=tensor.device)
            for place, held in block.views.items():
                if held is not None:
                    _spread(cells, held, place)
            block.cells = cells
        return block.cells


def storage_of(tensor: Tensor) -> int | None:
    """The storage's id; None for composite tensors."""
    if is_traceable_wrapper_subclass(tensor) or tensor.layout is not torch.strided:
        return None
    return tensor.untyped_storage()._cdata


def _place(tensor: Tensor) -> Geometry:
    return tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())


def _elements(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def _apart(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    reach = 0
    for step, count in sorted((s, n) for n, s in zip(size, stride, strict=True) if n > 1):
        if step <= reach:
            return False
        reach += (count - 1) * step
    return True


def _spread(cells: Tensor, held: Held | None, place: Geometry) -> bool:
    """Write a view's label into cells; false where overlapping elements may differ."""
    size, stride, offset = place
    if isinstance(held, (Listed, Patchy)) and not _apart(size, stride):
        return False
    region = cells.as_strided(size, stride, offset)
    for dim, step in enumerate(stride):
        if step == 0 and size[dim]:
            region = region.narrow(dim, 0, 1)
    if not _apart(tuple(region.shape), tuple(region.stride())):
        return False
    region.copy_(cells_of(held, len(size), cells.device).expand(region.shape))
    return True


_P, _Q = -7046029254386353131, -4658895280553007687
#: Words at a time, within a core's cache.
_CHUNK = 1 << 17


class MemoryState(NamedTuple):
    """The state of a whole storage; `digest` only on request."""

    version: int
    open: bool
    digest: int | None


def state_of(tensor: Tensor, *, digested: bool) -> MemoryState:
    storage = tensor.untyped_storage()
    return MemoryState(
        tensor._version, not storage.resizable(), _digest(tensor) if digested else None
    )


@torch.no_grad()
def _digest(tensor: Tensor) -> int:
    storage = tensor.untyped_storage()
    device = storage.device
    if not storage.nbytes() or device.type == "meta":
        return 0
    octets = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
    rest = len(octets) % 8
    parts = list(octets[: len(octets) - rest].view(torch.int64).split(_CHUNK))
    if rest:
        parts.append(F.pad(octets[-rest:], (0, 8 - rest)).view(torch.int64))
    total = torch.zeros((), dtype=torch.int64, device=device)
    for part in parts:
        mixed = part * _weights(device)[: len(part)]
        mixed ^= mixed >> 29
        total = total * _P + (mixed * _Q).sum()
    return int(total)


@cache
def _weights(device: torch.device) -> Tensor:
    return (2 * torch.arange(_CHUNK, device=device) + 1) * _P


class Remembered:
    """Storages of the model's tensors that depend on no request, with their states: its own, and
    cached results.

    A module may keep a table of biases in a dict. It depends on no request and no adapter if it
    existed before compilation, or if a graph computed it only from sizes and the model's tensors
    without LoRA, and as long as it is not written into.
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
