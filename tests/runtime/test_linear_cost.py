"""Matching, attaching and reading adapters take work in proportion to the number of modules."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dense_merge import REFERENCE
from hand_made import factors, save
from torch import nn

import lorafx
from lorafx.config import LoraConfig
from lorafx.runtime.marking import build_sites


def calls_of(work: Callable[[], Any]) -> int:
    """Python calls that `work` takes, generators' steps included."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


LAYERS = (10, 80)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.v_proj = nn.Linear(4, 2)
        self.norm = nn.LayerNorm(4)
        self.down_proj = nn.Linear(2, 4)


def build(layers: int) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList(Layer() for _ in range(layers))}).eval()


def linears(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]


TARGETS: list[Callable[[nn.Module], Any]] = [
    lambda model: None,
    linears,
    lambda model: [path.removeprefix("layers.") for path in linears(model)],
]


@pytest.mark.quick
@pytest.mark.parametrize("targets", TARGETS)
def test_matching(targets: Callable[[nn.Module], Any]) -> None:
    small, large = (build(layers) for layers in LAYERS)
    counts = [
        calls_of(lambda m=model: build_sites(m, LoraConfig(target_modules=targets(m))))
        for model in (small, large)
    ]
    assert counts[1] < 9 * counts[0]


def test_attaching_with_an_adapter_of_every_path(tmp_path: Path) -> None:
    """Banks, packed weights, and a checkpoint whose configuration lists all modules."""
    counts = []
    for layers in LAYERS:
        model = build(layers).requires_grad_(False)
        pairs = factors(model, linears(model), rank=1, seed=0)
        folder = save(model, tmp_path / str(layers), pairs)
        lorafx.detach(lorafx.attach(model, {"a": folder}, options=REFERENCE))  # first use of caches
        counts.append(
            calls_of(lambda m=model, f=folder: lorafx.attach(m, {"a": f}, options=REFERENCE))
        )
    assert counts[1] < 9 * counts[0]
