"""Adapters as the readers take them: opened, told apart by dialect, in PEFT's names.

source ─▶ Saved ─▶ dialect ─▶ key_mapping, or what moved ─▶ AdapterState

BD-LoRA: factors that PEFT saves as the blocks of a block-diagonal matrix, made whole.

A (r, K/n) → (r, K),   B (N, r/n) → (N, r):   rows of block i, columns of block i, else 0
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.adapter_store.dialects.all_dialects import dialect_of
from lorafx.adapter_store.moved import mapped, moved
from lorafx.adapter_store.opening import PICKLED as PICKLED
from lorafx.adapter_store.opening import SAFETENSORS as SAFETENSORS
from lorafx.adapter_store.opening import opened
from lorafx.adapter_store.peft_keys import parse, without_prefix
from lorafx.adapter_store.places import Places
from lorafx.adapter_store.saved import AdapterSource, AdapterState
from lorafx.errors import LorafxWarning
from lorafx.progress import LOG


def expanded(state: AdapterState, model: nn.Module) -> AdapterState:
    """`state` with full factors. What would be larger than the module it is for stays as it is, and
    the reader says what is wrong with its shape."""
    settings = state.config.block_diagonal
    if settings is None or settings.blocks == 1:
        return state
    places = Places((), model)
    largest = max((parameter.numel() for parameter in model.parameters()), default=0)
    tensors = dict(state.tensors)
    for key, tensor in state.tensors.items():
        factor = parse(key)
        if factor is None or factor.letter != settings.letter(without_prefix(factor.module)):
            continue
        module = places.meaning(factor.module)
        weight = getattr(module, "weight", None)
        size = weight.numel() if isinstance(weight, Tensor) else largest
        if _divides(tensor, settings.blocks) and tensor.numel() * settings.blocks <= size:
            tensors[key] = torch.block_diag(*tensor.chunk(settings.blocks))
    return replace(state, tensors=tensors)


def _divides(tensor: Tensor, blocks: int) -> bool:
    return tensor.dim() == 2 and len(tensor) > 0 and len(tensor) % blocks == 0


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
