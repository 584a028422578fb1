"""Where the numbers of a checkpoint tensor go, as data.

    W[box] permuted by `order` ← t[take],   box = a range of indices for each dimension of W

A *place* is a part of a target (lorafx.weights.targets). A *destination* has the places of one
checkpoint tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorafx.errors import CheckpointError
from lorafx.model.module_graph import writing
from lorafx.model.weight_formats import is_wrapped, plain_tensors
from lorafx.placements import is_placed, local, own_indices, whole
from lorafx.weights.loadable_layers import LoadableLayer, Shard
from lorafx.weights.targets import (
    Part,
    Take,
    Target,
    WeightShape,
    dtype_refusal,
    is_expanded,
    same_memory,
)


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
        if is_wrapped(self.target.tensor):  # whole, by `refusal`
            return self.target.tensor
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
        if is_wrapped(tensor) and is_wrapped(self.target.tensor) and not self._is_whole:
            return (
                f"a {type(tensor).__name__} is written as a whole only, under the name that "
                "state_dict() has for it here"
            )
        return dtype_refusal(self.target.tensor, tensor)

    @property
    def _is_whole(self) -> bool:
        every = Box.whole(self.target)
        return (self.box, self.order, self.take) == (every.box, every.order, ())

    def write(self, loaded: Tensor) -> None:
        """Write a tensor of the right shape, cast to the target's dtype, in place."""
        with writing(self.target.tensor):
            if is_placed(self.target.tensor) and loaded is not self.target.tensor:
                return self._write_share(whole(loaded))
            view = self.view
            if same_memory(view, loaded):
                return
            if not is_wrapped(view):
                view.copy_(loaded.reshape(view.shape))
                return
            for part, numbers in zip(plain_tensors(view), plain_tensors(loaded), strict=True):
                part.copy_(numbers)

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


class Conversion:
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


class ConversionMember(NamedTuple):
    group: Conversion
    name: str


Meaning = Destination | ConversionMember


def destinations_of(meaning: Meaning | None) -> tuple[Destination, ...]:
    if isinstance(meaning, ConversionMember):
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
