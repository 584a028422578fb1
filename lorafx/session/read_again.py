"""Adapters that host memory had no room for, from their files."""

from __future__ import annotations

from lorafx.adapter_store.peft_reader import Adapter, read_adapter
from lorafx.adapter_store.saved import AdapterSource
from lorafx.program.program import Program


def read_again(program: Program, source: AdapterSource, name: str) -> Adapter:
    """An adapter that was loaded from `source` before. What was worth a warning was said then.

    Raises:
        CheckpointError: it cannot be read.
    """
    return read_adapter(
        source,
        name,
        program.sites,
        model=program.model,
        max_rank=program.config.max_rank,
        lora_config=program.config,
        warn=False,
    )
