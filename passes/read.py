"""read: what the saved tensors of each adapter mean on the sites.

    name → AdapterState   →   Adapter each: part path → A, B, scale

Everything that is wrong with a file is found here, before the model has changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lorafx.adapter_store.peft_reader import read_adapter
from lorafx.program.preparation import Preparation
from lorafx.progress import progress


@dataclass(frozen=True)
class Read:
    """What the saved tensors of each adapter mean on the sites.

    Raises CheckpointError, UnsupportedAdapterError or CapacityError, which name the tensor.
    """

    name: ClassVar[str] = "read"

    def run(self, model: Preparation) -> int:
        for name in list(model.saved):
            with progress(f"reading adapter {name}"):
                adapter = read_adapter(
                    model.saved.pop(name),  # what was saved is not kept beside what was read
                    name,
                    model.sites,
                    model=model.model,
                    max_rank=model.config.max_rank,
                    lora_config=model.config,
                    strict=model.options.strict,
                )
                model.adapters.append(adapter)
                own = f"; weights with rows of its own: {len(adapter.own)}" if adapter.own else ""
                model.notes.append(
                    f"{name} from {adapter.source}: rank {adapter.rank}; modules or parts with "
                    f"factors: {len(adapter.weights)}{own}"
                )
                model.notes += (f"{name}: {note}" for note in adapter.notes)
        return len(model.adapters)
