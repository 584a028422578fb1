"""Checkpoint tensors that have a place only together with others.

    joint        q, k, v one after the other fill qkv_proj; all of them together say where each ends
    converted    what a conversion of transformers makes of them: per-expert weights concatenated,
                 permuted for rotary embeddings, split into several

A group is checked when its last tensor is known, and written when that arrives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafx.model.packed_names import spans
from lorafx.weights.weight_places import Destination, WeightShape


class JointGroup:
    """Checkpoint tensors `names` that fill `destinations` one after the other along `dim`; `path`
    is the first tensor's name in messages."""

    def __init__(
        self, whole: Destination, dim: int, names: tuple[str, ...], slices: tuple[int, ...] | None
    ) -> None:
        """`slices`: sizes along `dim` that the tensors have to partition, where they are known."""
        self.path, self.names = whole.path, names
        self.destinations: tuple[Destination, ...] = (whole,)
        self._dim, self._slices = dim, slices

    def misfit(self, shapes: Mapping[str, WeightShape]) -> str:
        whole, dim = self.destinations[0].shape, self._dim
        assert whole is not None
        given = [shapes[name] for name in self.names]
        rows = sum(shape[dim] if len(shape) == len(whole) else 0 for shape in given)
        fits = rows == whole[dim] and all(
            (*shape[:dim], whole[dim], *shape[dim + 1 :]) == whole for shape in given
        )
        if not fits:
            return f"shapes {', '.join(map(str, given))} do not fill {whole}"
        if self._slices is None or all(spans(self._slices, [shape[dim] for shape in given])):
            return ""
        named = ", ".join(f"{name} {shape}" for name, shape in zip(self.names, given, strict=True))
        return (
            f"slices of {self._slices} cannot be divided among {named}; declare with "
            "packed_modules which slices each name covers"
        )

    def joined(self, tensors: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """The tensors for `destinations`, of those of all `names`."""
        return [torch.cat([tensors[name] for name in self.names], dim=self._dim)]


class ConvertedGroup:
    def __init__(
        self,
        model: Any,
        converter: Any,
        key: str,
        destinations: tuple[Destination, ...],
        sources: Mapping[str, tuple[str, WeightShape]],
    ) -> None:
        """`sources`: the pattern of the converter and the shape, by the tensor's name."""
        self.path, self.names, self.destinations = key, tuple(sources), destinations
        self._model, self._converter, self._sources = model, converter, sources

    def misfit(self, shapes: Mapping[str, WeightShape]) -> str:
        wrong = [
            f"{name} has shape {shapes[name]}, expected {shape}"
            for name, (_, shape) in self._sources.items()
            if shapes[name] != shape
        ]
        return "; ".join(wrong)

    def joined(self, tensors: Mapping[str, Tensor]) -> Sequence[Tensor]:
        converter = deepcopy(self._converter)
        for name, (pattern, _) in self._sources.items():
            converter.add_tensor(self.path, name, pattern, tensors[name])
        made = converter.convert(self.path, model=self._model, config=self._model.config)
        values = (made[found.path] for found in self.destinations)
        return [value[0] if isinstance(value, list) else value for value in values]


TensorGroup = JointGroup | ConvertedGroup


@dataclass(frozen=True)
class GroupMember:
    group: TensorGroup
    name: str


Meaning = Destination | GroupMember


def destinations_of(meaning: Meaning | None) -> tuple[Destination, ...]:
    if isinstance(meaning, GroupMember):
        return meaning.group.destinations
    return () if meaning is None else (meaning,)
