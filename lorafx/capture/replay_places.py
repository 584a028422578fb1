"""What the guards of a traced layer are about, by steps that lead there from the layer.

    L['self'].layers[0]    .mlp    .up_proj    ._forward_hooks
    the layer              `base.mlp`, of the place before it, and so on

Another layer takes the same steps from where it is itself, and what one step leads to is the base
of several. So nothing is looked up by its source, which Python would have to compare.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from types import CodeType
from typing import Any

from torch._guards import ChainedSource, Source

from lorafx.capture.replay_arguments import NotAlike
from lorafx.capture.replay_sources import BASE, FrameScope, step_of

#: Where there is nothing, or nothing that could be found.
NOTHING = object()


class SourcePlaces:
    """Sources that lead through a layer.

    Args:
        roots: those of the layer itself, and of items that it picks.
        concerns: whether a source leads through one of them.

    Attributes:
        sources: each behind the one that it begins with. `bases` are the places of those, -1 for
            what begins with none; `steps` leads on from there, None where only Dynamo can.
    """

    def __init__(
        self, scope: FrameScope, roots: Collection[Source], concerns: Callable[[Source], bool]
    ) -> None:
        self.scope, self._roots, self._concerns = scope, set(roots), concerns
        self.sources: list[Source] = []
        self.bases: list[int] = []
        self.steps: list[CodeType | None] = []
        self._before: list[Any] = []
        self._places: dict[Source, int] = {}

    def place(self, source: Source) -> int:
        """Where a source stands that leads through the layer."""
        place = self._places.get(source)
        if place is not None:
            return place
        base, step = -1, None
        if isinstance(source, ChainedSource) and source not in self._roots:
            if self._concerns(source.base):
                base = self.place(source.base)
            if base >= 0 and not _has_another(source):
                step = step_of(source)
        place = self._places[source] = len(self.sources)
        self.sources.append(source)
        self.bases.append(base)
        self.steps.append(step)
        return place

    def before(self, place: int) -> Any:
        """What the traced layer has at a place, or NOTHING."""
        while len(self._before) <= place:
            self._before.append(value_at(self.scope, self.sources[len(self._before)]))
        return self._before[place]

    def is_inside(self, place: int) -> bool:
        """Whether a place is in something, and not a layer or an item itself."""
        source = self.sources[place]
        return isinstance(source, ChainedSource) and source not in self._roots

    def after(self, place: int, base: Any, source: Callable[[Source], Source]) -> Any:
        """What another layer has there, or NOTHING. `base` is what it has at the place before;
        `source` makes its source."""
        step = self.steps[place]
        if step is None:
            return value_at(self.scope, source(self.sources[place]))
        if base is NOTHING:
            return NOTHING
        try:
            return eval(step, self.scope.globals, {BASE: base})
        except Exception:
            return NOTHING


def value_at(scope: FrameScope, source: Source) -> Any:
    """What a source leads to, or NOTHING."""
    try:
        return scope.value(source)
    except NotAlike:
        return NOTHING


def _has_another(source: Source) -> bool:
    """Whether a source is made of more sources than the one that it begins with."""
    each: Any = source
    parts = (getattr(source, part.name) for part in dataclasses.fields(each))
    return sum(isinstance(part, Source) for part in parts) != 1
