"""read: the meaning of adapters' saved tensors on the sites; load: the store over the banks.

    name → AdapterState   →   Adapter each: part path → A, B, scale   →   AdapterStore

All errors in files are found here, before the model changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lorafx.adapter_store.peft_reader import read_adapter
from lorafx.adapter_store.store import AdapterStore, info
from lorafx.program.preparation import Preparation
from lorafx.progress import progress


@dataclass(frozen=True)
class Read:
    """The meaning of each adapter's saved tensors on the sites.

    Raises CheckpointError, UnsupportedAdapterError or CapacityError, which name the tensor.
    """

    name: ClassVar[str] = "read"

    def run(self, model: Preparation) -> int:
        for name in list(model.saved):
            with progress(f"reading adapter {name}"):
                adapter = read_adapter(
                    model.saved.pop(name),  # saved tensors are freed once read
                    name,
                    model.sites,
                    model=model.model,
                    max_rank=model.config.max_rank,
                    lora_config=model.config,
                    strict=model.options.strict,
                )
                model.adapters.append(adapter)
                rows = f"; weights with rows of its own: {len(adapter.own)}" if adapter.own else ""
                model.notes.append(
                    f"{name} from {adapter.source}: rank {adapter.rank}; modules or parts with "
                    f"factors: {len(adapter.weights)}{rows}"
                )
        return len(model.adapters)


@dataclass(frozen=True)
class LoadAdapters:
    """The store over the banks, with the adapters that were read."""

    name: ClassVar[str] = "load"

    def run(self, model: Preparation) -> int:
        assert model.attachment is not None
        config = model.config
        model.store = AdapterStore(
            model.attachment.groups, config.max_adapters, max_host_bytes=config.max_host_bytes
        )
        for adapter in model.adapters:
            model.store.load(adapter, model.origins.get(adapter.name))
            size = info(model.store, adapter.name).nbytes / 1e6
            model.notes.append(f"{adapter.name}: {size:.3g} MB of host memory, no slot yet")
        return len(model.adapters)
