"""A model on its way to being marked, as passes fill it in, and a report of each pass."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from lorafx.adapter_store.adapter import Adapter
from lorafx.adapter_store.saved import AdapterState, Origin
from lorafx.adapter_store.store import AdapterStore
from lorafx.config import LoraConfig, Options
from lorafx.interrupts import Rollback
from lorafx.model.marks import Attachment
from lorafx.model.module_graph import ModuleGraph
from lorafx.model.packing import PackedGroup
from lorafx.model.sites import Site


@dataclass(eq=False)
class Preparation:
    """The results of the passes so far. The model is unchanged until `attachment`.

    Attributes:
        saved: saved adapters by name, removed by `read`.
        origins: where adapters from files can be read again.
        graph: its modules (pass `alias`).
        sites: in canonical path order (`select`).
        adapters: decoded on the sites (`read`).
        attachment: groups, banks and marks (`attach`).
        store: the adapters in host memory, with slots (`load`).
        packed: siblings whose weights are views of one buffer (`pack_weights`).
        notes: the running pass's lines.
        rollback: undoes all changes to the model.
    """

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
    """A pass's result.

    Attributes:
        edits: of a graph; for a model, how many items were found or made.
        nodes: of the graph after it; 0 for passes over the model.
        end: of a pass over the model, by `time.perf_counter`.
        notes: of a pass over the model, as lines.
    """

    name: str
    edits: int
    seconds: float
    nodes: int = 0
    end: float = 0.0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        heading = f"{self.name}: {self.edits}, {self.seconds * 1e3:.1f} ms"
        return "\n  ".join([heading, *self.notes])
