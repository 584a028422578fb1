"""A model on its way to being marked: what the passes over a model read and fill in."""

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
    """What is known of the model so far. Nothing of it has changed before `attachment` is there.

    Attributes:
        saved: adapters as they were saved, by name; `read` takes them out.
        origins: where those of them can be read again that were read from files.
        graph: its modules (pass `alias`).
        sites: in canonical path order (`select`).
        adapters: what the saved tensors mean on the sites (`read`).
        attachment: groups, banks and marks (`attach`).
        store: the adapters in host memory, with slots (`load`).
        packed: siblings whose weights are views of one buffer (`pack_weights`).
        notes: what the running pass has found and done, a line each.
        rollback: undoes what has been done to the model.
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
