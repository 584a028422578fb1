"""load: the adapters that were read go to host memory; batches give them slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lorafx.adapter_store.store import AdapterStore
from lorafx.program.preparation import Preparation


@dataclass(frozen=True)
class LoadAdapters:
    """The store over the banks, with the adapters that were read."""

    name: ClassVar[str] = "load"

    def run(self, model: Preparation) -> int:
        assert model.attachment is not None
        config = model.config
        model.store = AdapterStore(
            model.attachment.groups,
            config.max_adapters,
            config.own_weights,
            config.max_host_bytes,
        )
        for adapter in model.adapters:
            model.store.load(adapter, model.origins.get(adapter.name))
            held = model.store[adapter.name].nbytes / 1e6
            model.notes.append(f"{adapter.name}: {held:.3g} MB of host memory, no slot yet")
        return len(model.adapters)
