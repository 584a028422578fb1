"""What the name of a checkpoint tensor means in a model, every way of naming tried in turn.

    as it stands, or without prefixes and wrappers, or renamed:
        the tensor itself ▸ routed experts ▸ packed projections ▸ a conversion of transformers

Several meanings of one name are told apart by the tensor's shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from lorafx.loading.conversions import Conversions
from lorafx.loading.expert_landings import ExpertLandings
from lorafx.loading.groups import GroupMember
from lorafx.loading.packed import PackedLandings
from lorafx.loading.weight_names import WeightNames
from lorafx.loading.weight_places import Landing, Target, WeightShape, at
from lorafx.model.module_graph import ModuleGraph
from lorafx.model.packed_names import PackedModules, PackedNames
from lorafx.model.saved_names import Walked, nearest_names

Meaning = Landing | GroupMember
#: How many unknown names get the names nearest to them, which takes a while.
_NEAREST = 10


class Resolver:
    """Finds what names mean in one model."""

    def __init__(self, graph: ModuleGraph, model: nn.Module, packed: PackedModules | None) -> None:
        """Raises ConfigError for a malformed declaration of packed names."""
        self.names = WeightNames(graph, model)
        self._experts = ExpertLandings(self.names)
        self._packed = PackedLandings(self.names, PackedNames(graph, packed))
        self._conversions = Conversions(model, self.names.transforms)
        self._unwanted = [
            re.compile(pattern)
            for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        ]
        self._advised = 0

    def meaning(self, name: str, shape: WeightShape) -> Meaning | None:
        """What a tensor of this name and shape means; None where the model has no place for it.

        Of several meanings the first whose shape fits, or the first of all where none does.
        """
        first: Meaning | None = None
        for found in self._meanings(name):
            if isinstance(found, GroupMember) or (
                not found.wrong and found.shape in (None, tuple(shape))
            ):
                return found
            first = first or found
        return first

    def shards(self, target: Target) -> dict[Any, str]:
        """The shard ids of a packed target, each with the name that is declared for it."""
        return self._packed.shards(target)

    def is_unwanted(self, name: str) -> bool:
        """Whether checkpoints of this model have `name` and the model itself does without."""
        readings = list(self.names.readings(name))
        if any(pattern.search(reading) for pattern in self._unwanted for reading in readings):
            return True
        return any(
            (target := self._own(reading)) is not None and not target.persistent
            for reading in readings
        )

    def advice(self, name: str) -> str:
        """What to say of a name that has no place."""
        if ".lora_" in name:
            return "a factor of an adapter; load_adapter takes those"
        if self._advised >= _NEAREST:
            return "no place in the model"
        self._advised += 1
        known = (target.name for target in self.names.required)
        return f"no place in the model{nearest_names(name, known)}"

    def _meanings(self, name: str) -> Iterator[Meaning]:
        readings = list(self.names.readings(name))
        if self._conversions.rearrange:
            # A family's own conversion knows better what a name means than its usual meaning does:
            # Inkling's w13_weight has gate and up interleaved.
            for reading in readings:
                if self._own(reading) is not None:
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
        for candidate in self.names.readings(newer):
            found = self._conversions.member(candidate, self._itself, rearranging=rearranging)
            if found is not None:
                yield found

    def _by_walking(self, reading: str) -> Iterator[Meaning]:
        walked = self.names.walk(reading)
        target = self._held(walked)
        if target is not None and target.is_buffer and not target.persistent:
            return
        yield from self._experts.landings(walked)
        if target is not None:
            yield at(target, walked.whole)
        yield from self._packed.landings(walked)

    def _own(self, reading: str) -> Target | None:
        return self._held(self.names.walk(reading))

    def _held(self, walked: Walked) -> Target | None:
        """The tensor that a name leads to, None where it leads to none."""
        one = len(walked.rest) == 1
        return self.names.target(walked.module, walked.rest[0]) if one else None

    def _itself(self, name: str) -> Landing | None:
        for reading in self.names.readings(name):
            found = self._own(reading)
            if found is not None:
                return at(found, name)
        return None
