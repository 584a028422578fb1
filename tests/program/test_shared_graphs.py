"""One graph that serves several layers whose weights carry sites at different places.

The weights are used without their modules, so no hook tells the layers apart: banks are looked up
by the weights that the graph is called with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense_merge import REFERENCE, TOLERANCE, Case, error
from torch import Tensor, nn

import lorafx

pytestmark = pytest.mark.quick


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(12, 12, bias=False)
        self.v = nn.Linear(12, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear(x, self.q.weight) + F.linear(x, self.v.weight)


class Layers(nn.Module):
    """Three layers with a break behind each: the second and third share the first one's graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = layer(x)
            torch._dynamo.graph_break()
        return {"logits": x}


CONFIG = {"max_adapters": 2, "max_rank": 4, "row_dims": {"x": 0}}
NOT_ALL = ["layers.0.q", "layers.0.v", "layers.1.v", "layers.2.q", "layers.2.v"]
ALL = [*NOT_ALL, "layers.1.q"]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def caller(case: Case, model: nn.Module, targets: list[str]) -> Callable[[Tensor], Any]:
    """Calls `model` with adapter "a" in both rows."""
    config = lorafx.LoraConfig(target_modules=targets, **CONFIG)
    cm = lorafx.compile(model, config, adapters={"a": case.folders["a"]}, options=REFERENCE)
    return lambda x: cm(x, adapter_names=["a", "a"])["logits"]


def test_a_layer_with_fewer_sites_than_the_one_that_was_captured(small: Any) -> None:
    case = small(Layers, NOT_ALL)
    call = caller(case, case.model(), NOT_ALL)
    x = torch.randn(2, 3, 12)
    assert error(call(x), case.expected(["a", "a"], {"x": x})) <= TOLERANCE


def test_weights_that_change_places_after_the_first_call(small: Any) -> None:
    """ΔW stays with the module, whatever weight it holds now."""
    case = small(Layers, ALL)
    model = case.model()
    call = caller(case, model, ALL)
    x = torch.randn(2, 3, 12)
    call(x)
    for module in (model, case.base):
        first, second = module.layers[0].q, module.layers[1].q
        first.weight, second.weight = second.weight, first.weight
    assert error(call(x), case.expected(["a", "a"], {"x": x})) <= TOLERANCE
