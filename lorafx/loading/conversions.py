"""Layouts from before transformers changed them.

    moe.gate_proj.weight, moe.up_proj.weight → mlp.experts.gate_up_proj

transformers says of each model what its loader does to a checkpoint. A conversion is undone on
tensors without numbers to learn which tensors, of which shapes, it takes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from lorafx.loading.groups import ConvertedGroup, GroupMember
from lorafx.loading.weight_places import Box, Landing, WeightShape


class Conversions:
    """What transformers' loader would do to a checkpoint of `model`."""

    def __init__(self, model: nn.Module, transforms: Sequence[Any]) -> None:
        """`transforms`: `SavedNames.transforms` of the model."""
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
        self._groups: dict[tuple[int, str], ConvertedGroup | str] = {}

    @property
    def rearrange(self) -> bool:
        """Whether a conversion does more than to put tensors one after the other: what it takes
        may have a name that means something else in most checkpoints."""
        return bool(self._rearranging)

    def member(
        self,
        name: str,
        find: Callable[[str], Landing | None],
        *,
        rearranging: bool = False,
    ) -> GroupMember | Landing | None:
        """The group that a renamed `name` belongs to; None where no conversion takes it.

        `find` gives the place of a tensor of the model by its name. With `rearranging` only of
        conversions as `rearrange` says.
        """
        for converter in self._rearranging if rearranging else self._converters:
            index = id(converter)
            key, pattern = converter.rename_source_key(name)
            if pattern is None:
                continue
            if (index, key) not in self._groups:
                self._groups[index, key] = self._group(converter, key, find)
            group = self._groups[index, key]
            if isinstance(group, str):
                return Landing(key, None, (), group) if group else None
            return GroupMember(group, name) if name in group.names else None
        return None

    def _group(
        self, converter: Any, key: str, find: Callable[[str], Landing | None]
    ) -> ConvertedGroup | str:
        """The group that fills `key`, or why there is none, "" where the model has no `key`."""
        first, *others = converter.target_patterns
        keys = [key, *(key.replace(first, other) for other in others)]
        found = [find(target) for target in keys]
        landings = tuple(landing for landing in found if landing is not None and landing.cuts)
        if len(landings) != len(keys):
            return ""
        places = [landing.cuts[0].place for landing in landings]
        boxes = [place for place in places if isinstance(place, Box)]
        if len(boxes) != len(keys):
            return "it is sharded over ranks, which transformers' conversion does not support"
        shapes = {target: box.target.tensor.shape for target, box in zip(keys, boxes, strict=True)}
        try:
            sources = self._undone(converter, shapes)
        except (NotImplementedError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            return f"transformers' conversion to {key} could not be reversed for checking: {error}"
        return ConvertedGroup(self._model, converter, key, landings, sources)

    def _undone(
        self, converter: Any, targets: dict[str, torch.Size]
    ) -> dict[str, tuple[str, WeightShape]]:
        """(pattern, shape) by name of what `converter` makes tensors of these shapes from."""
        undoing = deepcopy(converter).reverse_transform()
        key = ""
        for target, shape in targets.items():
            renamed, pattern = undoing.rename_source_key(target)
            key = key or renamed
            undoing.add_tensor(key, target, pattern, torch.empty(shape, device="meta"))
        made = undoing.convert(key, model=self._model, config=self._model.config)
        natural = sys.modules["transformers.core_model_loading"].dot_natural_key
        found = {}
        for name in sorted(made, key=natural):
            value = made[name][0] if isinstance(made[name], list) else made[name]
            pattern = converter.rename_source_key(name)[1]
            if pattern is None:
                raise ValueError(f"reversed, it yields {name}, which the conversion does not take")
            found[name] = (pattern, tuple(value.shape))
        return found
