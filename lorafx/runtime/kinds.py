"""Kinds of calls: those of one kind differ in values and sizes only, as far as Dynamo takes these
for symbols. So one graph serves them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lorafx.errors import numbered
from lorafx.program.argument_roles import PRIMARY, tensor_leaves

if TYPE_CHECKING:
    from lorafx.runtime.beside.process import Process
    from lorafx.runtime.call import ForwardCall

TierName = Literal["eager", "compiling", "ready", "kept eager", "refused"]

#: The calls of a kind before a process is forked for it.
CALLS = 2
#: The most kinds of calls that are told apart, and the deepest level of containers that is.
_MOST, _DEPTH = 256, 3


@dataclass(frozen=True)
class KindStatus:
    """A kind of calls: how many there were, how the next is answered, and why it stays eager."""

    kind: str
    calls: int
    tier: TierName
    reason: str = ""

    def __str__(self) -> str:
        why = self.reason
        if self.tier == "eager" and self.calls < CALLS:
            why = "its graph is compiled from its second call on"
        return f"{self.kind}, {numbered(self.calls, 'call')}: {self.tier}{why and f': {why}'}"


@dataclass(frozen=True)
class Status:
    """How the kinds of calls so far are answered, and the number of graphs in this process or ready
    to be loaded."""

    kinds: tuple[KindStatus, ...]
    graphs: int

    @property
    def compiling(self) -> int:
        """The number of kinds whose graph is being compiled."""
        return self.count("compiling")

    @property
    def progress(self) -> str:
        """Such as "compiling: 3 of 5 graphs"; empty if none is being compiled."""
        if not self.compiling:
            return ""
        kinds = len(self.kinds) - self.count("kept eager")
        return f"compiling: {self.count('ready')} of {kinds} graphs"

    def count(self, tier: TierName) -> int:
        return sum(kind.tier == tier for kind in self.kinds)

    def __str__(self) -> str:
        return "\n".join([numbered(self.graphs, "graph"), *map(str, self.kinds)])


@dataclass(eq=False)
class Kind:
    """A kind of calls. `saved`: the next call may load a graph; `wrong`: how often the call that a
    process was forked for raised; `graphs_seen`, `saved_seen`: how many graphs were here, and how
    many were saved, when none of them served such a call."""

    name: str
    calls: int = 0
    process: Process | None = None
    processes: int = 0
    has_graph: bool = False
    here: bool = False
    saved: bool = False
    wrong: int = 0
    graphs_seen: int = 0
    saved_seen: int = 0
    reason: str = ""
    refused: bool = False

    def note_served(self) -> None:
        """A graph of this process has answered such a call."""
        self.has_graph, self.saved, self.reason = True, False, ""

    @property
    def tier(self) -> TierName:
        if self.refused:
            return "refused"
        if self.process is not None:
            return "compiling"
        if self.has_graph or self.here or self.saved:
            return "ready"
        return "kept eager" if self.reason else "eager"


class Kinds:
    """The kinds of calls so far, the latest `_MOST` of them."""

    def __init__(self) -> None:
        self._by_form: dict[object, Kind] = {}

    def __iter__(self) -> Iterator[Kind]:
        return iter(list(self._by_form.values()))

    def of(self, call: ForwardCall) -> Kind:
        """The kind of a call."""
        program, fixed = call.session.program, call.session.dynamic is False
        form = (
            call.forward,
            (program.unguarded_state(), call.base, program.model.training),
            (torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
            tuple(_form(item, fixed) for item in call.args),
            tuple((name, _form(item, fixed)) for name, item in call.kwargs.items()),
        )
        kind = self._by_form.get(form)
        if kind is None:
            kind = self._by_form[form] = Kind(_name(call))
        return kind

    def drop_oldest(self) -> Kind | None:
        """Forget the oldest kind if there are too many. Returns it."""
        if len(self._by_form) <= _MOST:
            return None
        return self._by_form.pop(next(iter(self._by_form)))


def _form(value: Any, fixed: bool, depth: int = _DEPTH) -> object:
    """What graphs depend on of an argument; `fixed`: on all of its sizes."""
    if isinstance(value, Tensor):
        constant = getattr(value, "_dynamo_static_indices", ())
        sizes = tuple(
            size if fixed or dim in constant else min(size, 2)
            for dim, size in enumerate(value.shape)
        )
        return value.dtype, sizes, value.requires_grad, type(value)
    if value is None or isinstance(value, (bool, float, str, bytes)):
        return type(value), value
    if isinstance(value, int):
        return int, value if fixed else min(max(value, -1), 2)
    if isinstance(value, (list, tuple)) and depth:
        return type(value), tuple(_form(item, fixed, depth - 1) for item in value)
    if isinstance(value, Mapping) and depth:
        items = tuple((str(key), _form(item, fixed, depth - 1)) for key, item in value.items())
        return type(value), items
    # Whether a cache is empty.
    return type(value), tuple(_form(item, fixed) for item in islice(tensor_leaves(value), 1))


def _name(call: ForwardCall) -> str:
    program, kwargs = call.session.program, call.kwargs
    rows, names = len(program.runtime.rows), ["with adapters" if program.batch.touched else "base"]
    if call.forward.roles.packed:
        names = ["a step of continuous batching"]
    names.append("one request" if rows == 1 else "several requests")
    tokens = next((kwargs[name] for name in PRIMARY if isinstance(kwargs.get(name), Tensor)), None)
    if tokens is not None and tokens.dim() > 1:
        names.append("one token each" if tokens.shape[1] == 1 else "several tokens each")
    return f"{call.forward.name}, {', '.join(names)}"
