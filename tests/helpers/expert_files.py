"""A module of routed experts, and adapters of it made in memory: random pairs by path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import lorafx
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.peft_reader import Adapter, read_adapter
from lorafx.adapter_store.saved import AdapterState
from lorafx.runtime.marking import build_sites

PATH = "block.experts"


class Experts(nn.Module):
    """Two 3-D parameters, stored and named as asked for."""

    def __init__(
        self,
        experts: int = 3,
        hidden: int = 5,
        inner: int = 4,
        *,
        transposed: bool = False,
        declared: bool = True,
        halves: str = "stacked",
        names: tuple[str, str] = ("gate_up_proj", "down_proj"),
        down_first: bool = False,
    ) -> None:
        super().__init__()
        if declared:
            self.is_transposed = transposed
        self.is_concatenated = halves == "stacked"
        width = inner if halves == "" else 2 * inner
        sizes = [(names[0], (width, hidden)), (names[1], (hidden, inner))]
        for name, size in reversed(sizes) if down_first else sizes:
            shape = size[::-1] if transposed else size
            self.register_parameter(name, nn.Parameter(torch.zeros(experts, *shape)))


class Model(nn.Module):
    """Experts with a router beside them."""

    def __init__(self, **form: Any) -> None:
        super().__init__()
        self.block = nn.Module()
        self.block.router = nn.Module()
        self.block.router.weight = nn.Parameter(torch.zeros(3, 5))
        self.block.experts = Experts(**form)


def read(
    model: nn.Module, tensors: dict[str, Tensor], max_rank: int | None = None, **config: Any
) -> Adapter:
    state = state_of(tensors, **config)
    _, sites = build_sites(model, lorafx.LoraConfig(target_modules=["experts", "router"]))
    return read_adapter(state, "a", sites, model=model, max_rank=max_rank)


def state_of(tensors: dict[str, Tensor], **config: Any) -> AdapterState:
    settings = {"r": 2, "lora_alpha": 3, "peft_version": "0.21.2", **config}
    named = {f"base_model.model.{key}.weight": value for key, value in tensors.items()}
    return AdapterState(PeftConfig.read(settings), named, "memory")


def delta(model: nn.Module, adapter: Adapter, name: str) -> Tensor:
    """What the read factors add to the parameter, as it is stored."""
    _, sites = build_sites(model, lorafx.LoraConfig(target_modules=["experts"]))
    site = next(s for s in sites if s.path == f"{PATH}.{name}")
    rows = []
    for index, part in enumerate(site.parts):
        made = torch.zeros(site.experts, part.out_features, part.in_features)
        weights = adapter.weights.get(site.part_path(index))
        if weights is not None:
            for e in range(site.experts):
                r = int(weights.ranks[e])
                made[e] = float(weights.scale[e]) * weights.B[e, :, :r] @ weights.A[e, :r]
        rows.append(made)
    whole = torch.cat(rows, 1)
    return whole.mT if site.eligible.transposed else whole


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def pair(a: tuple[int, ...], b: tuple[int, ...], path: str, seed: int = 0) -> dict[str, Tensor]:
    return {f"{path}.lora_A": noise(*a, seed=seed), f"{path}.lora_B": noise(*b, seed=seed + 1)}
