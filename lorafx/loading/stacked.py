"""A stacked mapping that a model's author gives: which checkpoint names go into a packed parameter.

    ("qkv_proj", "q_proj", "q")     layers.0.q_proj.weight → layers.0.qkv_proj.weight, shard "q"

Names are compared by whole dotted segments: `gate` is not a part of `gate_up_proj`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from lorafx.loading.resolve import Meaning, Resolver
from lorafx.loading.weight_places import Landing, WeightShape, at
from lorafx.model.module_graph import ModuleGraph

#: (segments of the parameter's name, segments of the checkpoint's name, shard id)
StackedName = tuple[str, str, Any]


class StackedResolver(Resolver):
    """Looks names up in a mapping, before all other ways of naming but the model's own names."""

    def __init__(
        self, graph: ModuleGraph, model: nn.Module, stacked: Sequence[StackedName]
    ) -> None:
        super().__init__(graph, model, None)
        self._stacked = stacked

    def meaning(self, name: str, shape: WeightShape) -> Meaning | None:
        if self._own(name) is None:
            found = {
                candidate: at(own, candidate, shard_id)
                for param, saved, shard_id in self._stacked
                for reading in self.names.readings(name)
                for candidate in _replaced(reading, param, saved)
                if (own := self._own(candidate)) is not None
            }
            if len(found) > 1:
                wrong = f"the stacked mapping sends it to {', '.join(found)}"
                return Landing(name, None, (), wrong)
            if found:
                return next(iter(found.values()))
        return super().meaning(name, shape)


def _replaced(name: str, param: str, saved: str) -> Iterator[str]:
    """`name` with one run of segments, `saved`, replaced by `param`."""
    segments, run = name.split("."), saved.split(".")
    for i in range(len(segments) - len(run) + 1):
        if segments[i : i + len(run)] == run:
            yield ".".join([*segments[:i], param, *segments[i + len(run) :]])
