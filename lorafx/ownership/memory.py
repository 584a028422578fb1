"""Labels of real tensors, kept by storage: the request of each element, by position.

    SHARED             no element depends on a request
    Alone(b)           every element belongs to request b, or to none
    Listed(dim, L)     index i along `dim` belongs to request L[i], to none if that is NOBODY
    Patchy(cells)      cells[...] is the request of each element
    POOL               elements of all requests, of which a mask shows each query its own

None stands for unknown owners. `cells` are int16 tensors that broadcast to the tensor's shape.
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
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import islice
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdRef

from lorafx.torch_internals.graph_parts import storage_of_weak

NOBODY, UNKNOWN = -1, -2
#: The most items of a container that `in_code` looks at.
_MOST_ITEMS = 4096
MOST_REQUESTS = torch.iinfo(torch.int16).max


@dataclass(frozen=True)
class Shared:
    """No element depends on a request. `of_weights`: they depend on weights that adapters may
    change, so in a later call they may be others."""

    of_weights: bool = False


@dataclass(frozen=True)
class Alone:
    """Every element belongs to this request, or to none."""

    request: int


@dataclass(frozen=True)
class Listed:
    """Index i along `dim` belongs to request owners[i]."""

    dim: int
    owners: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Patchy:
    """Element by element."""

    cells: Tensor


@dataclass(frozen=True)
class Pool:
    """Elements of all requests, of which a mask shows each query its own."""


SHARED, OF_WEIGHTS, POOL = Shared(), Shared(of_weights=True), Pool()
RealLabel: TypeAlias = Shared | Alone | Listed | Patchy | Pool


def listed(dim: int, owners: tuple[int, ...]) -> RealLabel:
    """The label of index i along `dim` for request owners[i]; not `Listed` if all are equal."""
    if any(owner != owners[0] for owner in owners):
        return Listed(dim, owners)
    return SHARED if owners[0] == NOBODY else Alone(owners[0])


def settled(label: RealLabel | None) -> RealLabel | None:
    """The label, or Alone(b) if it lists request b and nobody: a row of nobody that a request has
    joined to its own is the request's."""
    requests = set(label.owners) - {NOBODY} if isinstance(label, Listed) else ()
    return Alone(min(requests)) if len(requests) == 1 else label


def repeated_owners(owners: tuple[int, ...], entries: Sequence[int]) -> tuple[int, ...] | None:
    """The owner of each of `entries` if every owner has equally many, adjacent; else None."""
    times, remainder = divmod(len(entries), len(owners))
    return None if remainder else tuple(owner for owner in owners for _ in range(times))


def cells_of(label: RealLabel | None, ndim: int, device: torch.device) -> Tensor:
    """Broadcastable cells of a tensor of `ndim` dimensions with this label."""
    if isinstance(label, Patchy):
        return label.cells
    if isinstance(label, Listed):
        sizes = [1] * ndim
        sizes[label.dim] = len(label.owners)
        return torch.tensor(label.owners, dtype=torch.int16, device=device).view(sizes)
    value = label.request if isinstance(label, Alone) else UNKNOWN
    value = NOBODY if isinstance(label, Shared) else value
    return torch.full([1] * ndim, value, dtype=torch.int16, device=device)


def label_of_cells(cells: Tensor) -> RealLabel | None:
    """The simplest label of these cells; None if an owner is unknown."""
    for dim, stride in enumerate(cells.stride()):
        if stride == 0:  # constant
            cells = cells.narrow(dim, 0, 1)
    if not cells.numel():
        return SHARED
    least, most = _least_and_most(cells, range(cells.dim()))
    lowest = int(cells.amin())
    if lowest == UNKNOWN:
        return None
    if int(most) == NOBODY:
        return SHARED
    single = int(least) == int(most)
    if single and lowest != NOBODY:
        return Alone(int(most))
    for dim in range(cells.dim()):
        others = [d for d in range(cells.dim()) if d != dim]
        least, most = _least_and_most(cells, others)
        if single and others:
            least = cells.amin(others)  # rows of nobody stay apart, or nothing is gained
        if bool(((least == most) | (most == NOBODY)).all()):
            return Listed(dim, tuple(most.tolist()))
    if single:
        return Alone(int(cells.amax()))
    return Patchy(cells.clone())  # a later write into these cells is not one into the label


def _least_and_most(cells: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The least and greatest request over `dims`; NOBODY is never the least."""
    if not dims:
        return cells, cells
    least = cells.masked_fill(cells == NOBODY, MOST_REQUESTS).amin(tuple(dims))
    return least, cells.amax(tuple(dims))


def joined(first: Tensor, second: Tensor) -> Tensor:
    """Cells of an elementwise result of two tensors."""
    first, second = torch.broadcast_tensors(first, second)
    agree = (first == second) | (second == NOBODY)
    return torch.where(first == NOBODY, second, torch.where(agree, first, UNKNOWN))


def renamed(label: RealLabel | None, requests: Mapping[int, int]) -> RealLabel | None:
    """The label with request b replaced by requests[b]."""
    if isinstance(label, Alone):
        return listed(0, (requests.get(label.request, label.request),))
    if isinstance(label, Listed):
        return listed(label.dim, tuple(requests.get(owner, owner) for owner in label.owners))
    return Patchy(renamed_cells(label.cells, requests)) if isinstance(label, Patchy) else label


def renamed_cells(cells: Tensor, requests: Mapping[int, int]) -> Tensor:
    """Cells with request b replaced by requests[b]; UNKNOWN and NOBODY are unchanged."""
    if not cells.numel():
        return cells
    table = torch.arange(UNKNOWN, max(int(cells.max()), *requests) + 1, dtype=torch.int16)
    for old, new in requests.items():
        table[old - UNKNOWN] = new
    return table.to(cells.device)[cells.long() - UNKNOWN]


def same_owners(lists: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The common list, if NOBODY matches any request; None if the lists differ."""
    if len({len(owners) for owners in lists}) != 1:
        return None
    if all(owners == lists[0] for owners in lists):
        return lists[0]
    common: list[int] = []
    for column in zip(*lists, strict=True):
        requests = {owner for owner in column if owner != NOBODY}
        if len(requests) > 1:
            return None
        common.append(requests.pop() if requests else NOBODY)
    return tuple(common)


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
            return SHARED if self._shared is not None and self._shared(tensor) else None
        if not self._intact(block, tensor):
            return None
        geometry = geometry_of(tensor)
        if geometry not in block.views:
            block.views[geometry] = self._label_by_others(block, tensor, geometry)
        return block.views[geometry]

    def computed(self, tensor: Tensor) -> bool:
        """Whether `tensor` has labels in this call, and no untracked write has changed it."""
        block = self.block(tensor)
        return block is not None and self._intact(block, tensor)

    def add_shared(self, tensors: Iterable[Tensor]) -> None:
        """Label tensors of unknown storages as SHARED."""
        for tensor in tensors:
            if self.block(tensor) is None and (block := self._new(tensor)) is not None:
                block.views[(_elements(tensor),), (1,), 0] = SHARED

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
        key = storage_of(tensor)
        block = None if key is None or self._alive(key) is not None else self._new(tensor, key)
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
                block.views[(_elements(tensor),), (1,), 0] = SHARED
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

    def _new(self, tensor: Tensor, key: int | None = None) -> Block | None:
        key = storage_of(tensor) if key is None else key
        if key is None:
            return None
        if tensor.is_inference():  # its writes are not counted
            self._blocks.pop(key, None)
            return None
        ref = StorageWeakRef(tensor.untyped_storage())
        block = self._blocks[key] = Block(ref, self._state(tensor), tensor.element_size())
        return block

    def _state(self, tensor: Tensor) -> MemoryState:
        return state_of(tensor, digested=self._guarded())

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
        elements = _elements(tensor)
        for (size, stride, offset), label in block.views.items():
            covers = not offset and math.prod(size) == elements and _no_overlap(size, stride)
            if covers and isinstance(label, (Shared, Alone, Pool)):
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
            elements = _elements(tensor)
            cells = torch.full((elements,), UNKNOWN, dtype=torch.int16, device=tensor.device)
            for geometry, label in block.views.items():
                if label is not None:
                    _fill_cells(cells, label, geometry)
            block.cells = cells
        return block.cells


def storage_of(tensor: Tensor) -> int | None:
    """The storage's id; None for composite tensors, and for those of torch.func's transforms."""
    if _is_composite(type(tensor)) or tensor.layout is not torch.strided:
        return None
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:
        return None


@cache
def _is_composite(kind: type[Tensor]) -> bool:
    return hasattr(kind, "__tensor_flatten__")


def geometry_of(tensor: Tensor) -> Geometry:
    return tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())


def _elements(tensor: Tensor) -> int:
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


def state_of(tensor: Tensor, *, digested: bool) -> MemoryState:
    storage = tensor.untyped_storage()
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
        if isinstance(value, nn.Parameter) or (vector and _elements(value) == value.numel()):
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
