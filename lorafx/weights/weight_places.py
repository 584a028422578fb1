"""Where the numbers of a checkpoint tensor go, as data.

    W[box] permuted by `order` ← t[take],   box = a range of indices for each dimension of W

A *target* is a parameter or buffer of the model, by any of its names. A *place* is a part of one.
A *destination* has the places of one checkpoint tensor. A `LoadableLayer` itself writes tensors of
the whole layer's sizes into this rank's part of its parameters.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorafx.errors import CheckpointError
from lorafx.model.module_graph import ModuleGraph, storage_key, writing
from lorafx.model.saved_names import SavedNames
from lorafx.model.weight_formats import is_wrapped
from lorafx.placements import is_placed, local, own_indices, whole
from lorafx.program.inputs import Holder


class WeightMethod:
    """Stores the weights of a layer, as its `quant_method`."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """`load_weights` calls it after every load of the layer's weights. Does nothing here."""


def methods_of(filled: Iterable[Target]) -> list[tuple[nn.Module, WeightMethod]]:
    """The modules of these targets whose weights a `WeightMethod` stores, each with its method."""
    modules = {id(target.module): target.module for target in filled}.values()
    methods = [(module, getattr(module, "quant_method", None)) for module in modules]
    return [(module, method) for module, method in methods if isinstance(method, WeightMethod)]


class LoadableLayer(nn.Module):
    """Base of layers whose subclasses define the shapes and shard ids of parameters.
    `output_sizes`: rows of output slices in checkpoints; `prefix`: the layer's name in messages."""

    prefix: str = ""
    output_sizes: tuple[int, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        #: The dimensions of each parameter that are sharded over ranks.
        self.cut_dims: dict[str, dict[str, int]] = {}

    def add_weight(self, name: str, value: Tensor, **cut_dims: int) -> None:
        """Register a parameter. `output_dim` and `input_dim` are its dimensions of outputs and
        inputs, of which this rank may have a part."""
        self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self.cut_dims[name] = cut_dims

    @abstractmethod
    def checkpoint_shape(self, name: str, shard_id: Any = None) -> tuple[int, ...]:
        """The shape of the checkpoint tensor for this shard; CheckpointError if it is unknown."""

    @abstractmethod
    def pieces(self, name: str, shard_id: Any = None) -> frozenset[Any]:
        """The pieces of a parameter that a shard id fills, each of which is loaded as a whole."""

    @abstractmethod
    def _load(self, name: str, loaded: Tensor, shard_id: Any) -> None: ...

    def fills(self, name: str, dtype: torch.dtype) -> tuple[str, ...]:
        """The parameters that a checkpoint tensor of this dtype for `name` fills."""
        return (name,)

    def load_weight(self, name: str, loaded_weight: Tensor, shard_id: Any = None) -> None:
        """Write a checkpoint tensor, of the whole layer's sizes, into this rank's parameter `name`,
        or its piece `shard_id`. CheckpointError for another name, shape, dtype or shard."""
        self.check_weight(name, loaded_weight.shape, shard_id)
        with torch.no_grad():
            self._load(name, loaded_weight, shard_id)

    def check_weight(self, name: str, shape: Sequence[int], shard_id: Any = None) -> None:
        """Raise CheckpointError if a checkpoint tensor of this shape cannot be loaded."""
        param = self._parameters.get(name)
        if param is None:
            raise CheckpointError(f"{self.label} has no parameter {name!r}")
        expected = self.checkpoint_shape(name, shard_id)
        where = f"{self.prefix or type(self).__name__}.{name}"
        if param.is_meta:
            raise CheckpointError(
                f"{where} is on the meta device and holds no values; call to_empty(device=...) on "
                "the model before loading"
            )
        if tuple(shape) != expected:
            which = "" if shard_id is None else f" (shard id {shard_id!r})"
            raise CheckpointError(
                f"{where}{which}: the checkpoint's tensor has shape {tuple(shape)}, expected "
                f"{expected}; the parameter has {tuple(param.shape)}"
            )

    @property
    def label(self) -> str:
        return f"{self.prefix} ({type(self).__name__})" if self.prefix else type(self).__name__


WeightShape = tuple[int, ...]
#: Indices of a part of a checkpoint tensor.
Take = tuple[slice | int, ...]
#: A part of a target: a box of indices, or pieces of a layer's parameter.
Part = tuple[range, ...] | frozenset[Any]


@dataclass(frozen=True)
class Target(Holder):
    """A parameter or buffer. `tensor` is looked up, since packing changes a parameter's storage."""

    @property
    def is_buffer(self) -> bool:
        return self.attribute in self.module._buffers

    @property
    def persistent(self) -> bool:
        return self.attribute not in self.module._non_persistent_buffers_set


@dataclass(frozen=True, eq=False)
class Box:
    """A part of a target: a range of indices for each dimension. Permuted by `order`, it gets the
    part `take` of the checkpoint's tensor."""

    target: Target
    box: tuple[range, ...]
    order: tuple[int, ...]
    take: Take = ()

    @classmethod
    def whole(cls, target: Target) -> Box:
        shape = target.tensor.shape
        return cls(target, tuple(map(range, shape)), tuple(range(len(shape))))

    def narrowed(self, dim: int, indices: range) -> Box:
        """The box with the `indices` of its own range of dimension `dim`."""
        selected = self.box[dim][indices.start : indices.stop : indices.step]
        return replace(self, box=(*self.box[:dim], selected, *self.box[dim + 1 :]))

    def swapped(self) -> Box:
        """The same box for a checkpoint with the last two dimensions swapped."""
        *leading, a, b = self.order
        return replace(self, order=(*leading, b, a))

    @property
    def shape(self) -> WeightShape:
        return tuple(len(self.box[dim]) for dim in self.order)

    @property
    def view(self) -> Tensor:
        index = tuple(slice(r.start, r.stop, r.step) for r in self.box)
        tensor = self.target.tensor.detach()
        return tensor[index].permute(self.order) if index else tensor

    def fills(self, dtype: torch.dtype) -> Iterator[tuple[Target, Part]]:
        """Yields (target, part) of all that a tensor of this dtype fills."""
        yield self.target, self.box

    def is_at(self, tensor: Tensor) -> bool:
        """Whether `tensor` has the memory of this place, so that writing it changes nothing."""
        return same_memory(self.view, tensor)

    def refusal(self, tensor: Tensor) -> str:
        """Why a tensor of this dtype and class cannot be written, or ""."""
        if is_expanded(self.target.tensor):
            return (
                "several of its entries share memory (an expanded tensor), so it cannot be "
                "written; leave it out, or make it contiguous before lorafx is given the "
                "model"
            )
        return _dtype_refusal(self.target.tensor, tensor)

    def write(self, loaded: Tensor) -> None:
        """Write a tensor of the right shape, cast to the target's dtype, in place."""
        with writing(self.target.tensor):
            if is_placed(self.target.tensor) and loaded is not self.target.tensor:
                return self._write_share(whole(loaded))
            view = self.view
            if not same_memory(view, loaded):
                view.copy_(loaded.reshape(view.shape))

    def _write_share(self, loaded: Tensor) -> None:
        """Write what this rank has of a DTensor, which is cut along one dimension at most."""
        inverse = [self.order.index(dim) for dim in range(len(self.box))]
        value, tensor = loaded.reshape(self.shape).permute(inverse), self.target.tensor
        view, cut = local(tensor).detach(), None
        for dim, wanted in enumerate(self.box):
            own = own_indices(tensor, dim)
            if own is None:
                view = view[(slice(None),) * dim + (slice(wanted.start, wanted.stop, wanted.step),)]
                continue
            at = own - wanted.start
            kept = (at >= 0) & (own < wanted.stop) & (at % wanted.step == 0)
            value = value.index_select(dim, at[kept] // wanted.step)
            cut = dim, kept.nonzero().flatten()
        value = value.to(device=view.device, dtype=view.dtype)
        if cut is None:
            view.copy_(value)
        else:
            view.index_copy_(*cut, value)


@dataclass(frozen=True, eq=False)
class Shard:
    """A shard id of a parameter of a `LoadableLayer`, which cuts checkpoint tensors itself."""

    target: Target
    shard_id: Any = None
    take: Take = ()

    @property
    def layer(self) -> LoadableLayer:
        assert isinstance(self.target.module, LoadableLayer)
        return self.target.module

    @property
    def shape(self) -> WeightShape:
        """The shape of the whole layer's tensor; CheckpointError for no such shard, or on meta."""
        shape = self.layer.checkpoint_shape(self.target.attribute, self.shard_id)
        self.layer.check_weight(self.target.attribute, shape, self.shard_id)
        return shape

    def fills(self, dtype: torch.dtype) -> Iterator[tuple[Target, Part]]:
        pieces = self.layer.pieces(self.target.attribute, self.shard_id)
        for name in self.layer.fills(self.target.attribute, dtype):
            yield Target(self.target.path, self.layer, name), pieces

    def is_at(self, tensor: Tensor) -> bool:
        return self.shard_id is None and same_memory(self.target.tensor, tensor)

    def refusal(self, tensor: Tensor) -> str:
        converted = len(self.layer.fills(self.target.attribute, tensor.dtype)) > 1
        return "" if converted else _dtype_refusal(self.target.tensor, tensor)

    def write(self, loaded: Tensor) -> None:
        with writing(self.target.tensor):
            self.layer.load_weight(self.target.attribute, loaded, self.shard_id)


WeightPlace = Box | Shard


@dataclass(frozen=True)
class Destination:
    """Where one checkpoint tensor goes.

    Attributes:
        path: its name in this model, without prefixes and wrappers.
        shape: the shape that it must have; None if it has no place.
        places: where its parts go.
        wrong: why it has no place, or "".
    """

    path: str
    shape: WeightShape | None
    places: tuple[WeightPlace, ...]
    wrong: str = ""

    def write(self, loaded: Tensor) -> None:
        for place in self.places:
            place.write(loaded[place.take] if place.take else loaded)


class ConvertedGroup:
    """Checkpoint tensors `names`, from which a conversion of transformers makes the tensors for
    `destinations`. A group is checked when its last tensor is known, and written when that arrives;
    `path` is its name in messages."""

    def __init__(
        self,
        model: Any,
        converter: Any,
        key: str,
        destinations: tuple[Destination, ...],
        sources: Mapping[str, tuple[str, WeightShape]],
    ) -> None:
        """`sources`: by each tensor's name, the converter's pattern for it, and its shape."""
        self.path, self.names, self.destinations = key, tuple(sources), destinations
        self._model, self._converter, self._sources = model, converter, sources

    def misfit(self, shapes: Mapping[str, WeightShape]) -> str:
        """Why the conversion does not take tensors of these shapes, or ""."""
        wrong = [
            f"{name} has shape {shapes[name]}, expected {shape}"
            for name, (_, shape) in self._sources.items()
            if shapes[name] != shape
        ]
        return "; ".join(wrong)

    def converted(self, tensors: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """The tensors for `destinations`, made from those of all `names`."""
        converter = deepcopy(self._converter)
        for name, (pattern, _) in self._sources.items():
            converter.add_tensor(self.path, name, pattern, tensors[name])
        outputs = converter.convert(self.path, model=self._model, config=self._model.config)
        values = (outputs[item.path] for item in self.destinations)
        return [value[0] if isinstance(value, list) else value for value in values]


class GroupMember(NamedTuple):
    group: ConvertedGroup
    name: str


Meaning = Destination | GroupMember


def destinations_of(meaning: Meaning | None) -> tuple[Destination, ...]:
    if isinstance(meaning, GroupMember):
        return meaning.group.destinations
    return () if meaning is None else (meaning,)


def no_place(path: str, why: str) -> Destination:
    return Destination(path, None, (), why)


def destination(target: Target, path: str, shard_id: Any = None) -> Destination:
    """A destination: the whole target, or the piece of a layer's parameter for a shard id."""
    tensor = target.tensor
    if isinstance(target.module, LoadableLayer) and not target.is_buffer:
        shard = Shard(target, shard_id)
        try:
            return Destination(path, shard.shape, (shard,))
        except CheckpointError as error:
            return no_place(path, str(error))
    if tensor.is_meta:
        return no_place(path, "it is on the meta device and holds no values")
    if callable(getattr(tensor, "weight_loader", None)):
        return no_place(
            path,
            "it has a weight_loader that is not of lorafx.layers; call that yourself, and leave "
            "the tensor out (strict=False)",
        )
    box = Box.whole(target)
    return Destination(path, box.shape, (box,))


class WeightNames(SavedNames):
    """Finds names of a checkpoint among the tensors of one model."""

    def __init__(self, graph: ModuleGraph, model: nn.Module) -> None:
        super().__init__(model)
        self.graph = graph
        self._targets: dict[tuple[int, str], Target] = {}
        for path, module in model.named_modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self._targets[id(module), name] = Target(path, module, name)
        #: How many names a tensor has, by its memory.
        self.name_counts = Counter(
            memory_key(tensor)
            for iterate in (model.named_parameters, model.named_buffers)
            for _, tensor in iterate(remove_duplicate=False)
        )

    @property
    def targets(self) -> list[Target]:
        """All parameters and buffers, each by its first name."""
        return list(self._targets.values())

    def target(self, module: nn.Module, attribute: str) -> Target | None:
        return self._targets.get((id(module), attribute))


def memory_key(tensor: Tensor) -> tuple[object, ...]:
    """A key that is equal for tensors with the same numbers in memory."""
    if storage_key(tensor) < 0:  # a wrapper without a storage of its own
        return (id(tensor),)
    return (storage_key(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


def same_memory(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and memory_key(a) == memory_key(b)


def is_expanded(tensor: Tensor) -> bool:
    """Whether several entries share memory, so that torch refuses to write the tensor."""
    if tensor.layout is not torch.strided:
        return False
    return any(
        size > 1 and not step for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    )


def overlapping(a: Part, b: Part) -> bool:
    """Whether two parts of a target share an entry; ranges of a dimension have one step, or one of
    them is all of it."""
    if isinstance(a, frozenset) or isinstance(b, frozenset):
        # Only the layer knows the indices of its pieces.
        return not (isinstance(a, frozenset) and isinstance(b, frozenset)) or bool(a & b)
    return all(
        p
        and q
        and max(p[0], q[0]) <= min(p[-1], q[-1])
        # Interleaved halves have every other index.
        and (p.step != q.step or (p[0] - q[0]) % p.step == 0)
        for p, q in zip(a, b, strict=True)
    )


def _dtype_refusal(target: Tensor, source: Tensor) -> str:
    dtype, new = target.dtype, source.dtype
    if source.is_meta or source.layout is not torch.strided:
        what = f"{source.layout}, on {source.device}"
        return f"the checkpoint's ({what}) is no dense tensor with values"
    wrapped, source_wrapped = map(is_wrapped, (target, source))
    if wrapped or source_wrapped:
        if source_wrapped and type(source) in (type(target), type(target.data)):
            return ""
        if source_wrapped:
            return f"the checkpoint's is a {type(source).__name__}; give the plain whole tensor"
        return f"it is kept here as a {type(target.data).__name__}, not as plain numbers"
    if dtype == new:
        return ""
    if dtype.itemsize == 1 or not dtype.is_floating_point:
        return f"it is quantised here ({dtype}), and the checkpoint's numbers are {new}"
    if new.itemsize == 1 or not new.is_floating_point:
        return f"the checkpoint's numbers are {new}, which do not become {dtype} without a scale"
    return ""
