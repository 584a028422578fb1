"""What the passes over a model have found so far, and a report of each pass."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from lorafx.adapter_store.saved import AdapterState, Origin
from lorafx.adapter_store.store import AdapterStore
from lorafx.adapter_store.stored import Adapter
from lorafx.config import LoraConfig, Options
from lorafx.interrupts import Rollback
from lorafx.model.marks import Attachment
from lorafx.model.module_graph import ModuleGraph
from lorafx.model.packing import PackedGroup
from lorafx.model.sites import Site


@dataclass(eq=False)
class Preparation:
    """The results of the passes so far: `graph` (alias), `sites` (select), `adapters` (read, from
    `saved`), `attachment` (attach), `store` (load) and `packed` siblings (pack_weights). The model
    is unchanged until `attachment`; `rollback` undoes all changes."""

    model: nn.Module
    config: LoraConfig
    options: Options = field(default_factory=Options)
    saved: dict[str, AdapterState] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)
    graph: ModuleGraph = field(init=False)
    sites: tuple[Site, ...] = ()
    adapters: list[Adapter] = field(default_factory=list)
    attachment: Attachment | None = None
    store: AdapterStore | None = None
    packed: tuple[PackedGroup, ...] = ()
    notes: list[str] = field(default_factory=list)
    rollback: Rollback = field(default_factory=Rollback)


@dataclass(frozen=True)
class PassReport:
    """A pass's result: `edits` of a graph, or items of a model; `nodes` after it, 0 for a model.
    `notes` are of passes over the model."""

    name: str
    edits: int
    seconds: float
    nodes: int = 0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        heading = f"{self.name}: {self.edits}, {self.seconds * 1e3:.1f} ms"
        return "\n  ".join([heading, *self.notes])
