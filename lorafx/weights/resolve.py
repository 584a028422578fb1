"""Finds the meaning of a checkpoint tensor's name in a model.

    unchanged, or without prefixes and wrappers, or renamed, it is tried as
        a tensor's name ▸ one of routed experts ▸ of packed projections ▸ of a conversion

If a name has several meanings, the tensor's shape decides. A conversion of transformers is reversed
on meta tensors to find out which tensors it takes, with their shapes:

    moe.gate_proj.weight, moe.up_proj.weight → mlp.experts.gate_up_proj
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from lorafx.model.module_graph import ModuleGraph
from lorafx.model.packed_names import PackedModules, PackedNames
from lorafx.model.saved_names import Walked, nearest_names
from lorafx.weights.expert_destinations import ExpertDestinations
from lorafx.weights.packed_destinations import PackedDestinations
from lorafx.weights.targets import Target, WeightNames, WeightShape
from lorafx.weights.weight_places import (
    Box,
    Conversion,
    ConversionMember,
    Destination,
    Meaning,
    destination,
    no_place,
)


class Conversions:
    """The conversions that transformers' loader would apply to a checkpoint of `model`."""

    def __init__(self, model: nn.Module, transforms: Sequence[Any]) -> None:
        self._model = model
        self._converters: list[Any] = []
        self._rearranging: list[Any] = []
        if transforms:
            loading = sys.modules["transformers.core_model_loading"]
            self._converters = [t for t in transforms if isinstance(t, loading.WeightConverter)]
            stacking = (loading.MergeModulelist, loading.Concatenate)
            self._rearranging = [
                converter
                for converter in self._converters
                if not all(isinstance(op, stacking) for op in converter.operations)
            ]
        self._groups: dict[tuple[int, str], Conversion | str] = {}

    @property
    def rearrange(self) -> bool:
        """Whether some do more than concatenate, so that the names of inputs are ambiguous."""
        return bool(self._rearranging)

    def member(
        self, name: str, find: Callable[[str], Destination | None], *, rearranging: bool = False
    ) -> ConversionMember | Destination | None:
        """The group of a renamed `name`; None if no conversion takes it. `find` returns a tensor's
        place by its name. `rearranging`: only conversions that do more than concatenate."""
        for converter in self._rearranging if rearranging else self._converters:
            index = id(converter)
            key, pattern = converter.rename_source_key(name)
            if pattern is None:
                continue
            if (index, key) not in self._groups:
                self._groups[index, key] = self._group(converter, key, find)
            group = self._groups[index, key]
            if isinstance(group, str):
                return no_place(key, group) if group else None
            return ConversionMember(group, name) if name in group.names else None
        return None

    def _group(
        self, converter: Any, key: str, find: Callable[[str], Destination | None]
    ) -> Conversion | str:
        first, *more = converter.target_patterns
        keys = [key, *(key.replace(first, pattern) for pattern in more)]
        candidates = map(find, keys)
        destinations = tuple(item for item in candidates if item is not None and item.places)
        if len(destinations) != len(keys):
            return ""
        boxes = [place for d in destinations if isinstance(place := d.places[0], Box)]
        if len(boxes) != len(keys):
            return "it is sharded over ranks, which transformers' conversion does not support"
        shapes = {target: box.target.tensor.shape for target, box in zip(keys, boxes, strict=True)}
        try:
            sources = self._inputs_of(converter, shapes)
        except (NotImplementedError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            return f"transformers' conversion to {key} could not be reversed for checking: {error}"
        return Conversion(self._model, converter, key, destinations, sources)

    def _inputs_of(
        self, converter: Any, targets: dict[str, torch.Size]
    ) -> dict[str, tuple[str, WeightShape]]:
        """(pattern, shape), by name, of the tensors from which `converter` makes these shapes."""
        inverse = deepcopy(converter).reverse_transform()
        key = ""
        for target, shape in targets.items():
            renamed, pattern = inverse.rename_source_key(target)
            key = key or renamed
            inverse.add_tensor(key, target, pattern, torch.empty(shape, device="meta"))
        inputs = inverse.convert(key, model=self._model, config=self._model.config)
        natural_key = sys.modules["transformers.core_model_loading"].dot_natural_key
        sources = {}
        for name in sorted(inputs, key=natural_key):
            value = inputs[name][0] if isinstance(inputs[name], list) else inputs[name]
            pattern = converter.rename_source_key(name)[1]
            if pattern is None:
                raise ValueError(f"reversed, it yields {name}, which the conversion does not take")
            sources[name] = (pattern, tuple(value.shape))
        return sources


#: For how many unknown names a message has the nearest names, which take long to find.
_NEAREST = 10


class Resolver:
    def __init__(self, graph: ModuleGraph, model: nn.Module, packed: PackedModules | None) -> None:
        self.names = WeightNames(graph, model)
        self._experts = ExpertDestinations(self.names)
        self._packed = PackedDestinations(self.names, PackedNames(graph, packed))
        self._conversions = Conversions(model, self.names.transforms)
        self._unwanted = [
            re.compile(pattern)
            for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        ]
        self._advised = 0

    def meaning(self, name: str, shape: WeightShape) -> Meaning | None:
        """The first meaning of this name with a fitting shape, else the first, or None."""
        first: Meaning | None = None
        for item in self._meanings(name):
            if isinstance(item, ConversionMember):
                return item
            if not item.wrong and item.shape in (None, tuple(shape)):
                return item
            first = first or item
        return first

    def is_unwanted(self, name: str) -> bool:
        """Whether checkpoints of this model may have `name` although the model does not."""
        readings = list(self.names.readings(name))
        if any(pattern.search(reading) for pattern in self._unwanted for reading in readings):
            return True
        return any(
            (target := self._tensor_at(reading)) is not None and not target.persistent
            for reading in readings
        )

    def advice(self, name: str) -> str:
        if ".lora_" in name:
            return "a factor of an adapter; load_adapter takes those"
        if self._advised >= _NEAREST:
            return "no place in the model"
        self._advised += 1
        known = (str(target) for target in self.names.targets)
        return f"no place in the model{nearest_names(name, known)}"

    def _meanings(self, name: str) -> Iterator[Meaning]:
        readings = list(self.names.readings(name))
        if self._conversions.rearrange:
            # A family's conversion has precedence over the usual meaning of a name: Inkling's
            # w13_weight has gate and up interleaved.
            for reading in readings:
                if self._tensor_at(reading) is not None:
                    yield from self._by_walking(reading)
            for reading in readings:
                yield from self._converted(self.names.renamed(reading), rearranging=True)
        for reading in readings:
            yield from self._by_walking(reading)
        for reading in readings:
            newer = self.names.renamed(reading)
            if newer != reading:
                yield from self._by_walking(newer)
            yield from self._converted(newer)

    def _converted(self, newer: str, *, rearranging: bool = False) -> Iterator[Meaning]:
        for name in self.names.readings(newer):
            item = self._conversions.member(name, self._tensor_place, rearranging=rearranging)
            if item is not None:
                yield item

    def _by_walking(self, reading: str) -> Iterator[Meaning]:
        walked = self.names.walk(reading)
        target = self._walked_tensor(walked)
        if target is not None and target.is_buffer and not target.persistent:
            return
        yield from self._experts.destinations(walked)
        if target is not None:
            yield destination(target, walked.full_path)
        yield from self._packed.destinations(walked)

    def _tensor_at(self, reading: str) -> Target | None:
        return self._walked_tensor(self.names.walk(reading))

    def _walked_tensor(self, walked: Walked) -> Target | None:
        complete = len(walked.remaining) == 1
        return self.names.target(walked.module, walked.remaining[0]) if complete else None

    def _tensor_place(self, name: str) -> Destination | None:
        for reading in self.names.readings(name):
            target = self._tensor_at(reading)
            if target is not None:
                return destination(target, name)
        return None
