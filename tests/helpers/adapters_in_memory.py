"""Adapters without files: factors by path, what lorafx reads of them, and W + ΔW."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lorafx

#: (A, B) by the path of a module.
Factors: TypeAlias = Mapping[str, tuple[Tensor, Tensor]]
Normal: TypeAlias = Callable[[tuple[int, ...]], Tensor]


def factors_of(module: nn.Module, rank: int, normal: Normal) -> tuple[Tensor, Tensor]:
    """Random factors of a linear, an embedding or a convolution, as PEFT shapes them."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, *rest = weight.shape
    if isinstance(module, nn.Embedding):
        return normal((rank, rows)), normal((rest[0], rank))
    return normal((rank, *rest)), normal((rows, rank, *[1] * (len(rest) - 1)))


def source_of(model: nn.Module, factors: Factors) -> lorafx.AdapterSource:
    """The factors as an adapter with s = 1."""
    tensors = {}
    for path, (A, B) in factors.items():
        key = f"base_model.model.{path}"
        if isinstance(model.get_submodule(path), nn.Embedding):
            tensors |= {f"{key}.lora_embedding_A": A, f"{key}.lora_embedding_B": B}
        else:
            tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
    rank = next(iter(factors.values()))[0].shape[0]
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    return lorafx.AdapterSource(tensors, config={**settings, "target_modules": list(factors)})


@torch.no_grad()
def merge(model: nn.Module, factors: Factors) -> None:
    """Add ΔW to the weights of `model`, of any dtype."""
    for path, (A, B) in factors.items():
        module = model.get_submodule(path)
        weight = module.weight
        assert isinstance(weight, Tensor)
        A, B = A.to(weight.dtype), B.to(weight.dtype)
        delta = A.T @ B.T if isinstance(module, nn.Embedding) else B.flatten(1) @ A.flatten(1)
        if parametrize.is_parametrized(module):  # ΔW is of the weight that calls use
            parametrize.remove_parametrizations(module, "weight")
            weight = module.weight = nn.Parameter(weight.clone(), requires_grad=False)
        weight += delta.view(weight.shape)
