"""Adapters as the readers take them: opened, told apart by dialect, in PEFT's names.

source ─▶ Saved ─▶ dialect ─▶ key_mapping, or what moved ─▶ AdapterState
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from lorafx.adapter_store.dialects.all_dialects import dialect_of
from lorafx.adapter_store.expanding import expanded
from lorafx.adapter_store.moved import mapped, moved
from lorafx.adapter_store.opening import PICKLED as PICKLED
from lorafx.adapter_store.opening import SAFETENSORS as SAFETENSORS
from lorafx.adapter_store.opening import opened
from lorafx.adapter_store.saved import AdapterSource, AdapterState
from lorafx.errors import LorafxWarning
from lorafx.progress import LOG


def load_state(source: Any, model: nn.Module | None = None, *, warn: bool = True) -> AdapterState:
    """Configuration and tensors of `source`, in PEFT's names.

    Args:
        source: an `AdapterSource`, what its `source` may be, or an `AdapterState`, which is
            returned.
        model: what the adapter is for. Without it names of dialects that flatten them stay as they
            are, and factors of embeddings read like those of linears.
        warn: whether factors for other models of a pipeline are worth a warning.

    Raises:
        CheckpointError: absent, truncated or of another format, or names that are ambiguous.
        UnsupportedAdapterError: a configuration, or an adapter's kind, that lorafx cannot honour.
    """
    if isinstance(source, AdapterState):
        return source
    asked = source if isinstance(source, AdapterSource) else AdapterSource(source)
    saved = opened(asked)
    state = dialect_of(saved, asked.dialect).state(saved, model)
    if model is not None:
        state = expanded(state, model)
    if asked.key_mapping:
        state = mapped(state, asked.key_mapping)
    elif model is not None:
        state = moved(state, model)
    if warn and state.left_out and asked.component is None:
        warnings.warn(
            f"{state.where} has factors for other models of a pipeline too "
            f"({', '.join(state.left_out)}), which are not used here: load it into those as well, "
            "or say AdapterSource(..., component=...)",
            LorafxWarning,
            stacklevel=2,
        )
    for note in state.notes:
        LOG.info("adapter in %s: %s", state.where, note)
    return state
