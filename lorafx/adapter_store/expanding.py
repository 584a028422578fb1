"""BD-LoRA: factors that PEFT saves as the blocks of a block-diagonal matrix, made whole.

A (r, K/n) → (r, K),   B (N, r/n) → (N, r):   rows of block i, columns of block i, else 0
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lorafx.adapter_store.peft_keys import parse, without_prefix
from lorafx.adapter_store.places import Places
from lorafx.adapter_store.saved import AdapterState


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
