"""Adapters from their files, for a program whose sites and room are known."""

from __future__ import annotations

from typing import Any

from lorafx.adapter_store.peft_reader import Adapter, read_adapter
from lorafx.adapter_store.saved import AdapterSource
from lorafx.program.program import Program


def read_for(
    program: Program, source: Any, name: str, *, strict: bool = False, warn: bool = True
) -> Adapter:
    """As `read_adapter`, for the program's sites; raises as that."""
    return read_adapter(
        source,
        name,
        program.sites,
        model=program.model,
        max_rank=program.config.max_rank,
        lora_config=program.config,
        strict=strict,
        warn=warn,
    )


def read_again(program: Program, source: AdapterSource, name: str) -> Adapter:
    """An adapter that host memory had no room for. What was worth a warning was said when it was
    loaded from `source`.

    Raises:
        CheckpointError: it cannot be read.
    """
    return read_for(program, source, name, warn=False)
