"""The meaning of each input of a graph, and the attribute or weight that it comes from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from lorafx.model.module_graph import Holder
from lorafx.model.sites import Group, Site
from lorafx.program.argument_roles import Role
from lorafx.program.weight_forms import WeightForm


@dataclass(frozen=True)
class Derived:
    """The weight (N, K) of tied `sites` in a tensor; its form if regular; `copied` if no view."""

    sites: tuple[Site, ...]
    form: WeightForm | None
    shape: tuple[int, int]
    copied: bool


InputKind = Literal[
    "symbol", "weight", "state", "bank", "slots", "packed", "argument", "result", "unknown"
]


#: `FrameInput.part` of a tensor of which a module makes its weight in each call.
MADE = "made"


@dataclass(frozen=True)
class FrameInput:
    """A graph input.

    Attributes:
        kind: "symbol" (a size), "weight" (of a selected site, or derived), "state" (another
            parameter, buffer or attribute), "bank", "slots", "packed" (packed base weight or bias),
            "argument" (of the call), "result" (of an earlier graph of the call, with proved
            owners), "unknown" (made between graphs, a global).
        label: its name in messages.
        sites: the sites with this base weight or bias.
        part: the attribute of a tensor subclass that this is; "" for a whole input.
        counts: this symbol was the number of requests at capture.
        placed: it is a DTensor, whose only tensor is this rank's part of it.
    """

    kind: InputKind
    label: str
    sites: tuple[Site, ...] = ()
    group: Group | None = None
    role: Role | None = None
    derived: Derived | None = None
    holder: Holder | None = None
    part: str = ""
    counts: bool = False
    placed: bool = False

    def part_of(self, part: str, value: Any) -> FrameInput:
        """The input that is an attribute, or a size, of this tensor subclass."""
        kind: InputKind = self.kind
        if not isinstance(value, Tensor):
            kind = "symbol"
        elif kind in ("argument", "result"):  # the subclass decides the layout of its parts
            kind = "unknown"
        if self.placed and isinstance(value, Tensor):
            return self
        sites = self.sites if kind == "weight" else ()
        return replace(self, kind=kind, label=f"{self.label}.{part}", sites=sites, part=part)

    @property
    def requests_dim(self) -> int | None:
        if self.kind not in ("argument", "result") or self.role is None or not self.role.known:
            return None
        return None if self.role.several else self.role.dim

    @property
    def several_dim(self) -> int | None:
        return self.role.dim if self.role is not None and self.role.several else None
