"""What each input of a graph is: the passes rested on it, so it is asked again before loading.

Torch's guards say how a tensor looks. That it is the weight of this site, the bank of that group,
an argument whose first dimension holds the requests, is lorafx's own knowledge (`Frame`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lorafx.capture.parts import Captured
from lorafx.program.frame import FrameInput
from lorafx.program.program import Program
from lorafx.program.roles import Role
from lorafx.saved_graphs.fingerprints import Undescribed
from lorafx.saved_graphs.guards import value_at
from lorafx.torch_internals.dynamo import Source
from lorafx.torch_internals.saved_frames import TensorProperty, TensorPropertySource

#: An input that another graph made, or that is a view of a weight, depends on more than its place.
_OF_PLACES = ("symbol", "weight", "state", "bank", "slots", "packed", "argument")


@dataclass
class SavedInputs:
    """Of each input the place where Dynamo found it, and what it was. A size has a place where it
    is that of a tensor."""

    places: list[Source | None]
    texts: list[str]

    @classmethod
    def of(cls, graph: Captured, program: Program) -> SavedInputs:
        """Raises Undescribed where an input depends on more than the model and the call."""
        places: list[Source | None] = []
        for item, source in zip(graph.frame.inputs, graph.sources, strict=True):
            if item.kind not in _OF_PLACES or item.derived is not None:
                raise Undescribed(f"{item.label} was made outside of the graph")
            sized = isinstance(source, TensorPropertySource)
            if source is None or (item.counts and not sized):
                raise Undescribed(f"where {item.label} comes from is not known")
            places.append(source if item.kind != "symbol" or sized else None)
        return cls(places, [_text(item, program) for item in graph.frame.inputs])

    def hold(self, program: Program, f_locals: dict[str, Any], f_globals: dict[str, Any]) -> bool:
        """Whether each of them is that now."""
        known, arguments = program.known_tensors(), program.call_arguments()
        cache: dict[Source, Any] = {}
        values: list[Tensor] = []
        for place, text in zip(self.places, self.texts, strict=True):
            if place is None:
                continue
            if isinstance(place, TensorPropertySource):
                whole = value_at(place.base, f_locals, f_globals, cache)
                item = FrameInput("symbol", "", counts=_counts(place, whole, arguments))
            else:
                value = value_at(place, f_locals, f_globals, cache)
                if not isinstance(value, Tensor):
                    return False
                values.append(value)
                item = _input(value, known, arguments)
            if _text(item, program) != text:
                return False
        return not program.derived.inputs(values, known, arguments)


def _input(value: Tensor, known: dict[int, FrameInput], arguments: dict[int, Role]) -> FrameInput:
    """As in `Frame.of`, but for what earlier graphs made."""
    if id(value) in known:
        return known[id(value)]
    if id(value) in arguments:
        return FrameInput("argument", "", role=arguments[id(value)])
    return FrameInput("state" if value.dim() == 0 else "unknown", "")


def _counts(place: TensorPropertySource, whole: Any, arguments: dict[int, Role]) -> bool:
    role = arguments.get(id(whole))
    if place.prop is not TensorProperty.SIZE or role is None or not role.known:
        return False
    return role.dim == place.idx and whole.shape[place.idx] > 1


def _text(item: FrameInput, program: Program) -> str:
    group = None if item.group is None else program.groups.index(item.group)
    holder = None if item.holder is None else str(item.holder)
    label = item.label if item.kind in ("bank", "packed") else ""
    sites = [site.path for site in item.sites]
    kind = f"{item.kind} {label} counts {item.counts}"
    return f"{kind} {sites} group {group} held by {holder} {item.role}"
