"""Where the numbers of a checkpoint tensor go, as data.

    W[box] permuted by `order` ← t,   box = a range of indices for each dimension of W

A *target* is a parameter or buffer of the model, whatever names lead to it. A *place* is a part of
one. A *destination* maps parts of one checkpoint tensor to places.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorafx.errors import CheckpointError, LorafxError
from lorafx.model.module_graph import ModuleGraph, join, storage_key, writing
from lorafx.model.saved_names import SavedNames
from lorafx.torch_internals.subclasses import is_traceable_wrapper_subclass
from lorafx.weights.loadable_layer import LoadableLayer

WeightShape = tuple[int, ...]


class Numbers(NamedTuple):
    """A tensor's dtype, and its class where that wraps other tensors."""

    dtype: torch.dtype
    wrapper: type | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> Numbers:
        return cls(tensor.dtype, type(tensor) if is_traceable_wrapper_subclass(tensor) else None)


@dataclass(frozen=True, eq=False)
class Target:
    """A parameter or buffer: the module that holds it, its name there, and its dotted name."""

    module: nn.Module
    attribute: str
    name: str

    @property
    def tensor(self) -> Tensor:
        """The present tensor: packing gives parameters other storages."""
        parameter = self.module._parameters.get(self.attribute)
        found = self.module._buffers.get(self.attribute) if parameter is None else parameter
        assert found is not None
        return found

    @property
    def is_buffer(self) -> bool:
        return self.module._parameters.get(self.attribute) is None

    @property
    def persistent(self) -> bool:
        return self.attribute not in self.module._non_persistent_buffers_set

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for tied tensors."""
        return memory_key(self.tensor)


@dataclass(frozen=True, eq=False)
class Box:
    """Indices of a tensor: a range for each of its dimensions, in `order` the checkpoint's."""

    target: Target
    box: tuple[range, ...]
    order: tuple[int, ...]

    @classmethod
    def whole(cls, target: Target) -> Box:
        shape = target.tensor.shape
        return cls(target, tuple(map(range, shape)), tuple(range(len(shape))))

    def narrowed(self, dim: int, indices: range) -> Box:
        """The part of dimension `dim` of the target that `indices` select of what is left of it."""
        kept = self.box[dim][indices.start : indices.stop : indices.step]
        return Box(self.target, (*self.box[:dim], kept, *self.box[dim + 1 :]), self.order)

    def swapped(self) -> Box:
        """The same for a checkpoint with the last two dimensions swapped."""
        *leading, a, b = self.order
        return Box(self.target, self.box, (*leading, b, a))

    @property
    def shape(self) -> WeightShape:
        return tuple(len(self.box[dim]) for dim in self.order)

    @property
    def view(self) -> Tensor:
        index = tuple(slice(r.start, r.stop, r.step) for r in self.box)
        tensor = self.target.tensor.detach()
        return tensor[index].permute(self.order) if index else tensor

    def fills(self, dtype: torch.dtype) -> Iterator[tuple[Target, Any]]:
        """(target, part) for everything that a tensor of this dtype gives values to."""
        yield self.target, self.box

    def is_at(self, tensor: Tensor) -> bool:
        """Whether `tensor` is this place in memory, so that writing it changes nothing."""
        return same_memory(self.view, tensor)

    def refusal(self, given: Numbers) -> str:
        """Why such numbers cannot be written, "" where they can."""
        if is_expanded(self.target.tensor):
            return (
                "several of its entries share memory (an expanded tensor), so it cannot be "
                "written; leave it out, or make it contiguous before lorafx is given the "
                "model"
            )
        return _unlike(self.target.tensor, given)

    def write(self, loaded: Tensor) -> None:
        """Write a tensor of the right shape. Casts; never moves the target."""
        with writing(self.target.tensor):
            view = self.view
            if not same_memory(view, loaded):
                view.copy_(loaded.reshape(view.shape))


@dataclass(frozen=True, eq=False)
class Shard:
    """A shard id of a parameter of a layer that cuts checkpoint tensors itself."""

    target: Target
    shard_id: Any = None

    @property
    def layer(self) -> LoadableLayer:
        assert isinstance(self.target.module, LoadableLayer)
        return self.target.module

    @property
    def shape(self) -> WeightShape:
        """Shape of the whole layer's tensor; CheckpointError for no such shard, or on meta."""
        shape = self.layer.checkpoint_shape(self.target.attribute, self.shard_id)
        self.layer.check_weight(self.target.attribute, shape, self.shard_id)
        return shape

    def fills(self, dtype: torch.dtype) -> Iterator[tuple[Target, Any]]:
        pieces = self.layer.pieces(self.target.attribute, self.shard_id)
        prefix = self.target.name.removesuffix(self.target.attribute)
        for name in self.layer.fills(self.target.attribute, dtype):
            yield Target(self.layer, name, prefix + name), pieces

    def is_at(self, tensor: Tensor) -> bool:
        return self.shard_id is None and same_memory(self.target.tensor, tensor)

    def refusal(self, given: Numbers) -> str:
        converted = len(self.layer.fills(self.target.attribute, given.dtype)) > 1
        return "" if converted else _unlike(self.target.tensor, given)

    def write(self, loaded: Tensor) -> None:
        parameter = self.target.tensor
        assert isinstance(parameter, nn.Parameter)
        with writing(parameter):
            self.layer.weight_loader(parameter, loaded, self.shard_id)


@dataclass(frozen=True, eq=False)
class OwnLoader:
    """A parameter with a `weight_loader` of the model's, which alone knows its shapes."""

    target: Target
    shard_id: Any = None

    def fills(self, dtype: torch.dtype) -> Iterator[tuple[Target, Any]]:
        yield self.target, frozenset([self.shard_id])

    def is_at(self, tensor: Tensor) -> bool:
        return False

    def refusal(self, given: Numbers) -> str:
        return ""

    def write(self, loaded: Tensor) -> None:
        arguments = () if self.shard_id is None else (self.shard_id,)
        parameter: Any = self.target.tensor
        try:
            with writing(parameter):
                parameter.weight_loader(parameter, loaded, *arguments)
        except (AssertionError, RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(f"{self.target.name}: {error}") from error


WeightPlace = Box | Shard | OwnLoader


@dataclass(frozen=True)
class Cut:
    """A part of a checkpoint tensor, indexed by `take`, and the place that it goes to."""

    place: WeightPlace
    take: tuple[slice | int, ...] = ()


@dataclass(frozen=True)
class Destination:
    """What one checkpoint tensor means.

    Attributes:
        path: its name in this model, without prefixes and wrappers.
        shape: the shape it must have; None where only a parameter's own loader knows.
        cuts: its parts, each with its place.
        wrong: why it has no place after all, "" where it has.
        turned: of a matrix that checkpoints have either way round, whether it came transposed;
            None of all others.
    """

    path: str
    shape: WeightShape | None
    cuts: tuple[Cut, ...]
    wrong: str = ""
    turned: bool | None = None

    @property
    def square(self) -> bool:
        """Whether the shape leaves the orientation open."""
        return self.shape is not None and len(self.shape) > 1 and self.shape[-1] == self.shape[-2]

    def write(self, loaded: Tensor) -> None:
        for cut in self.cuts:
            cut.place.write(loaded[cut.take] if cut.take else loaded)


def no_place(path: str, why: str) -> Destination:
    return Destination(path, None, (), why)


def destination(target: Target, path: str, shard_id: Any = None) -> Destination:
    """The whole target, or the piece of it that a shard id means."""
    tensor = target.tensor
    if isinstance(target.module, LoadableLayer) and not target.is_buffer:
        shard = Shard(target, shard_id)
        try:
            return Destination(path, shard.shape, (Cut(shard),))
        except CheckpointError as error:
            return no_place(path, str(error))
    if tensor.is_meta:
        return no_place(path, "it is on the meta device and holds no values")
    if callable(getattr(tensor, "weight_loader", None)):
        return Destination(path, None, (Cut(OwnLoader(target, shard_id)),))
    box = Box.whole(target)
    return Destination(path, box.shape, (Cut(box),))


class WeightNames(SavedNames):
    """The tensors of one model, and what names of a checkpoint lead to."""

    def __init__(self, graph: ModuleGraph, model: nn.Module) -> None:
        super().__init__(model)
        self.graph = graph
        self._targets: dict[tuple[int, str], Target] = {}
        for path, module in model.named_modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self._targets[id(module), name] = Target(module, name, join(path, name))

    @property
    def targets(self) -> list[Target]:
        """All parameters and buffers, each by its first name."""
        return list(self._targets.values())

    def target(self, module: nn.Module, attribute: str) -> Target | None:
        return self._targets.get((id(module), attribute))

    def ways(self, target: Target) -> int:
        """How many paths lead to a target's module; 2 where there are more."""
        try:
            return len(self.graph.paths(target.module, limit=2))
        except LorafxError:  # put there since the model was compiled
            return 1


def memory_key(tensor: Tensor) -> tuple[object, ...]:
    """Equal for tensors that are the very same numbers in memory."""
    if storage_key(tensor) < 0:  # a wrapper without a storage of its own
        return (id(tensor),)
    return (storage_key(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


def same_memory(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and memory_key(a) == memory_key(b)


def is_expanded(tensor: Tensor) -> bool:
    """Whether several entries are one place in memory, so that torch does not write to it."""
    if tensor.layout is not torch.strided:
        return False
    return any(
        size > 1 and not step for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    )


def meet(a: Iterable[range], b: Iterable[range]) -> bool:
    """Whether two boxes share an entry; ranges of a dimension have one step, or one has all."""
    return all(
        p
        and q
        and max(p[0], q[0]) <= min(p[-1], q[-1])
        # Interleaved halves have every other index.
        and (p.step != q.step or (p[0] - q[0]) % p.step == 0)
        for p, q in zip(a, b, strict=True)
    )


def _unlike(tensor: Tensor, given: Numbers) -> str:
    held, dtype = tensor.dtype, given.dtype
    if is_traceable_wrapper_subclass(tensor) or given.wrapper is not None:
        if given.wrapper is type(tensor) or given.wrapper is type(tensor.data):
            return ""
        if given.wrapper is None:
            return f"it is kept here as a {type(tensor.data).__name__}, not as plain numbers"
        return f"the checkpoint's is a {given.wrapper.__name__}; give the plain whole tensor"
    if held == dtype:
        return ""
    if held.itemsize == 1 or not held.is_floating_point:
        return f"it is quantised here ({held}), and the checkpoint's numbers are {dtype}"
    if dtype.itemsize == 1 or not dtype.is_floating_point:
        return f"the checkpoint's numbers are {dtype}, which do not become {held} without a scale"
    return ""
