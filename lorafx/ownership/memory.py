"""The labels of real tensors, kept by storage.

A label belongs to a view of a storage. For a view without one, the labels of other views are
written into cells, one for each element of the storage. A storage that was written by untracked
code loses its labels; its state reveals such writes:

    version     counts the writes that torch sees
    open        torch has exported the memory as a numpy array, which may be written into
    digest      of all its bytes, for writers that have its address (DLPack, an extension):
                Python's hash, of 64 bits
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef

from lorafx.model.weight_formats import is_wrapped, plain_tensors
from lorafx.ownership.labels import One, Pooled
from lorafx.ownership.real_labels import (
    POOL,
    SHARED,
    UNKNOWN,
    Listed,
    Patchy,
    RealLabel,
    Shared,
    cells_of,
    label_of_cells,
    listed,
    renamed,
    renamed_cells,
)
from lorafx.torch_internals.graph_parts import storage_of_weak

#: sizes, strides, offset
Geometry: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], int]


@dataclass(eq=False, slots=True)
class Block:
    """The labels of a storage, which gets none after it was `exported` to numpy. `born`: the call
    has allocated it."""

    ref: StorageWeakRef
    state: MemoryState
    itemsize: int
    exported: bool = False
    #: Operators that were not seen have written it.
    rewritten: bool = False
    born: bool = False
    views: dict[Geometry, RealLabel | None] = field(default_factory=dict)
    #: Grows with every write; labels that were looked up before are no longer valid.
    epoch: int = 0
    #: (elements of the storage,) int16, once a view without a label was looked up.
    cells: Tensor | None = None


class Memory:
    """Labels of the tensors of a call.

    Args:
        shared: whether a tensor is the model's, which depends on no request.
        guarded: whether requests differ, so that untracked writes must be found.

    Attributes:
        unseen: a tensor was exported to numpy, or written by untracked code.
    """

    def __init__(
        self,
        shared: Callable[[Tensor], bool] | None = None,
        guarded: Callable[[], bool] = lambda: True,
    ) -> None:
        self._shared, self._guarded = shared, guarded
        self._blocks: dict[int, Block] = {}
        self._pools: dict[int | None, StorageWeakRef] = {}
        self.unseen = False

    def look(self, tensor: Tensor) -> RealLabel | None:
        """The current label of a tensor; None for unknown owners."""
        if not tensor.numel():
            return SHARED
        if self._is_pool(tensor):
            return POOL
        block = self.block(tensor)
        if block is None:
            return SHARED if self._is_shared(tensor) else None
        if not self._intact(block, tensor):
            return None
        geometry = geometry_of(tensor)
        if geometry not in block.views:
            block.views[geometry] = self._label_by_others(block, tensor, geometry)
        return block.views[geometry]

    def _is_shared(self, tensor: Tensor) -> bool:
        shared = self._shared
        if shared is None or shared(tensor):
            return shared is not None
        return is_wrapped(tensor) and all(map(shared, plain_tensors(tensor)))

    def computed(self, tensor: Tensor) -> bool:
        """Whether `tensor` has labels in this call, and no untracked write has changed it."""
        block = self.block(tensor)
        return block is not None and self._intact(block, tensor)

    def add_shared(self, tensors: Iterable[Tensor]) -> None:
        """Label tensors of unknown storages as SHARED."""
        for tensor in tensors:
            if self.block(tensor) is None and (block := self._new(tensor)) is not None:
                block.views[(elements_of(tensor),), (1,), 0] = SHARED

    def add_pool(self, tensor: Tensor) -> None:
        """Label all views of a storage as POOL. Writes are not looked for: the label says nothing
        of single elements."""
        self._pools[storage_of(tensor)] = StorageWeakRef(tensor.untyped_storage())

    def _is_pool(self, tensor: Tensor) -> bool:
        pool = self._pools.get(storage_of(tensor)) if self._pools else None
        return pool is not None and not pool.expired()

    def set_label(self, tensor: Tensor, label: RealLabel | None) -> None:
        if self._is_pool(tensor):
            return
        block = self.block(tensor) or self._new(tensor)
        if block is not None:
            block.views[geometry_of(tensor)] = label

    def note(self, tensor: Tensor, label: RealLabel | None, inputs: Iterable[Tensor] = ()) -> None:
        """Label a result of `inputs`, or a view of one."""
        key, block = storage_of(tensor), self.block(tensor)
        if key is None or all(storage_of(item) != key for item in inputs):
            block = self._new(tensor)
        elif label is None or block is None or not self._intact(block, tensor):
            return
        if block is not None:
            block.views[geometry_of(tensor)] = label

    def born(self, tensor: Tensor, label: RealLabel | None) -> Block | None:
        """Label a result, and return its storage's labels; None for a view of a known storage."""
        storage = _storage(tensor)
        if storage is None or self._alive(storage._cdata) is not None:
            return None
        block = self._new(tensor, storage)
        if block is not None:
            block.born = True
            block.views[geometry_of(tensor)] = label
        return block

    def unwritten(self, block: Block, tensor: Tensor) -> bool:
        """Whether the labels of the tensor's storage, `block`, all follow from the first one's."""
        return block.born and not block.epoch and self._intact(block, tensor)

    def write(self, tensor: Tensor, label: RealLabel | None, *, uncounted: int = 0) -> None:
        """Label a written tensor, whose version lacks the last `uncounted` writes."""
        self._pools.pop(storage_of(tensor), None)
        block, geometry = self.block(tensor), geometry_of(tensor)
        if block is not None:
            block.epoch += 1
            if block.exported:
                return
        counts = not tensor.is_inference()
        if not counts or block is None or block.itemsize != tensor.element_size():
            shared = block is None and self._shared is not None and self._shared(tensor)
            block = self._new(tensor)
            if block is None:
                return
            if shared:
                block.views[(elements_of(tensor),), (1,), 0] = SHARED
        if block.cells is not None or (block.views and set(block.views) != {geometry}):
            cells = self._cells(block, tensor)
            if not _fill_cells(cells, label, geometry):
                cells.fill_(UNKNOWN)
            block.views.clear()
        block.views[geometry] = label
        state = self._state(tensor)
        block.state = state._replace(version=state.version + uncounted)

    def made_of_nothing(self) -> bool:
        """Whether a tensor lives that the call has allocated and that depends on no request."""
        return any(
            block.born and SHARED in block.views.values() and not block.ref.expired()
            for block in self._blocks.values()
        )

    def shares(self, tensor: Tensor) -> bool:
        """Whether a tensor from elsewhere, such as DLPack, lies in memory that has labels."""
        address = tensor.data_ptr()
        alive = (block for block in self._blocks.values() if not block.ref.expired())
        storages = (storage_of_weak(block.ref.cdata) for block in alive)
        return any(
            item is not None and item.data_ptr() <= address < item.data_ptr() + item.nbytes()
            for item in storages
        )

    def rename(self, requests: Mapping[int, int]) -> None:
        if not requests:
            return
        for block in self._blocks.values():
            block.views = {view: renamed(label, requests) for view, label in block.views.items()}
            if block.cells is not None:
                block.cells = renamed_cells(block.cells, requests)

    def _new(self, tensor: Tensor, storage: UntypedStorage | None = None) -> Block | None:
        storage = _storage(tensor) if storage is None else storage
        if storage is None:
            return None
        if tensor.is_inference():  # its writes are not counted
            self._blocks.pop(storage._cdata, None)
            return None
        block = Block(StorageWeakRef(storage), self._state(tensor, storage), tensor.element_size())
        self._blocks[storage._cdata] = block
        return block

    def _state(self, tensor: Tensor, storage: UntypedStorage | None = None) -> MemoryState:
        return state_of(tensor, storage, digested=self._guarded())

    def _intact(self, block: Block, tensor: Tensor) -> bool:
        """Whether the memory is unchanged since it was labelled. If not, its labels are dropped."""
        if tensor.is_inference() or block.exported:
            return False
        state = state_of(tensor, digested=block.state.digest is not None)
        if state == block.state:
            return block.itemsize == tensor.element_size()
        self.unseen, block.exported = True, state.open != block.state.open
        block.rewritten = state.version != block.state.version
        block.views, block.cells = {}, None
        return False

    def block(self, tensor: Tensor) -> Block | None:
        """The labels of the tensor's storage."""
        key = storage_of(tensor)
        return None if key is None else self._alive(key)

    def _alive(self, key: int) -> Block | None:
        block = self._blocks.get(key)
        return None if block is None or block.ref.expired() else block

    def _label_by_others(self, block: Block, tensor: Tensor, view: Geometry) -> RealLabel | None:
        elements = elements_of(tensor)
        for (size, stride, offset), label in block.views.items():
            covers = not offset and math.prod(size) == elements and _no_overlap(size, stride)
            if covers and isinstance(label, (Shared, One, Pooled)):
                return label
            if (
                covers
                and isinstance(label, Listed)
                and stride[label.dim] * size[label.dim] == (elements)
            ):
                by_strides = _label_by_strides(view, label.owners, stride[label.dim])
                if by_strides is not None:
                    return by_strides
        cells = self._cells(block, tensor)
        return label_of_cells(cells.as_strided(*view))

    def _cells(self, block: Block, tensor: Tensor) -> Tensor:
        if block.cells is None:
            elements = elements_of(tensor)
            cells = torch.full((elements,), UNKNOWN, dtype=torch.int16, device=tensor.device)
            for geometry, label in block.views.items():
                if label is not None:
                    _fill_cells(cells, label, geometry)
            block.cells = cells
        return block.cells


def storage_of(tensor: Tensor) -> int | None:
    """The storage's id; None for composite tensors, and for those of torch.func's transforms."""
    storage = _storage(tensor)
    return None if storage is None else storage._cdata


def _storage(tensor: Tensor) -> UntypedStorage | None:
    if _is_composite(type(tensor)) or tensor.layout is not torch.strided:
        return None
    try:
        return tensor.untyped_storage()
    except NotImplementedError:
        return None


@cache
def _is_composite(kind: type[Tensor]) -> bool:
    return hasattr(kind, "__tensor_flatten__")


def geometry_of(tensor: Tensor) -> Geometry:
    return tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())


def elements_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def _no_overlap(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    reach = 0
    for step, count in sorted((s, n) for n, s in zip(size, stride, strict=True) if n > 1):
        if step <= reach:
            return False
        reach += (count - 1) * step
    return True


def _label_by_strides(view: Geometry, owners: tuple[int, ...], extent: int) -> RealLabel | None:
    """The label of a view of a storage in which element a belongs to owners[a // extent]; None if
    it is not regular."""
    (first, inside), owner_dim, step = divmod(view[2], extent), 0, 0
    for dim, (size, stride) in enumerate(zip(view[0], view[1], strict=True)):
        if size > 1 and stride >= extent:
            if step or stride % extent:
                return None
            owner_dim, step = dim, stride // extent
        else:
            inside += (size - 1) * stride
    if inside >= extent:
        return None
    count = view[0][owner_dim] if step else 1
    return listed(owner_dim, tuple(owners[first + i * step] for i in range(count)))


def _fill_cells(cells: Tensor, label: RealLabel | None, geometry: Geometry) -> bool:
    """Write a view's label into cells. Returns False if overlapping elements may differ."""
    size, stride, offset = geometry
    if isinstance(label, (Listed, Patchy)) and not _no_overlap(size, stride):
        return False
    region = cells.as_strided(size, stride, offset)
    for dim, step in enumerate(stride):
        if step == 0 and size[dim]:
            region = region.narrow(dim, 0, 1)
    if not _no_overlap(tuple(region.shape), tuple(region.stride())):
        return False
    region.copy_(cells_of(label, len(size), cells.device).expand(region.shape))
    return True


class MemoryState(NamedTuple):
    """The state of a whole storage; `digest` is None unless it was requested."""

    version: int
    open: bool
    digest: int | None


def state_of(
    tensor: Tensor, storage: UntypedStorage | None = None, *, digested: bool
) -> MemoryState:
    storage = tensor.untyped_storage() if storage is None else storage
    return MemoryState(
        tensor._version, not storage.resizable(), _digest(tensor) if digested else None
    )


def _digest(tensor: Tensor) -> int:
    storage = tensor.untyped_storage()
    if not storage.nbytes() or storage.device.type == "meta":
        return 0
    if storage.device.type != "cpu":
        storage = storage.cpu()
    return hash(ctypes.string_at(storage.data_ptr(), storage.nbytes()))
