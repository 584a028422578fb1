"""Adapters with weights of their own (modules_to_save, trainable_token_indices), saved by PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import oracle
import peft
import torch
from dense_merge import Case
from torch import nn

#: Of parameters that PEFT trains, beside the factors.
_TRAINED = ("lora_", "modules_to_save", "trainable_tokens_delta")


@torch.no_grad()
def save_own(base: nn.Module, folder: Path, *, seed: int, **config: Any) -> Path:
    """An adapter that PEFT makes of this configuration, trained to random numbers and saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(oracle.untied_copy(base), peft.LoraConfig(**config))
        train(model, seed)
        model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@torch.no_grad()
def train(model: nn.Module, seed: int) -> None:
    """Give every parameter that PEFT trains random numbers of the size of a weight."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(mark in name for mark in _TRAINED):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def own_case(base: nn.Module, folder: Path, configs: Mapping[str, Mapping[str, Any]]) -> Case:
    """A case of `base` with an adapter of each name and configuration."""
    return Case(
        base,
        {
            name: save_own(base, folder / name, seed=seed, **{"r": 2, **config})
            for seed, (name, config) in enumerate(configs.items(), 1)
        },
    )
