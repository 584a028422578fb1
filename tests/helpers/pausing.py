"""A model that runs what it is told to between its two layers, and adapters of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from dense_merge import Case, error, save_adapter
from torch import Tensor, nn

import lorafx

K = 6
MIXED = ["a", None, "b"]


class Pausing(nn.Module):
    """Between its two layers it runs what it is told to, outside of every graph."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(K, K), nn.Linear(K, K)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.relu(self.up(x))
        pause()
        return {"logits": self.down(h)}


_TODO: list[Callable[[], Any]] = []


@torch._dynamo.disable
def pause() -> None:
    while _TODO:
        _TODO.pop()()


@pytest.fixture
def meanwhile() -> Iterator[list[Callable[[], Any]]]:
    yield _TODO
    _TODO.clear()


@pytest.fixture
def pausing(small) -> Case:
    case = small(Pausing, ["up", "down"])
    case.folders["c"] = save_adapter(
        case.base, case.folders["a"].parent / "c", rank=2, targets=["up", "down"], seed=9
    )
    return case


def served(case: Case, slots: int = 2) -> Any:
    config = lorafx.LoraConfig(max_adapters=slots)
    model = case.model()
    return lorafx.compile(model, config, adapters=case.folders, options={"lowering": "reference"})


def rows(count: int = 3) -> Tensor:
    return torch.randn(count, 2, K)


def check(cm: Any, case: Case, names: list[str | None], x: Tensor) -> None:
    assert error(cm(x=x, adapter_names=names)["logits"], case.expected(names, {"x": x})) <= 1e-5
