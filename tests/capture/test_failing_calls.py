"""Calls that raise. Dynamo gives up what raises while it is traced, for good and for all models
that share the code; here the next call is served as if nothing had been."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attached import fresh_dynamo  # noqa: F401  (the fixture)
from dense_merge import REFERENCE, error
from torch import Tensor, nn

import lorafx
from lorafx.errors import ProvenanceError

K = 6
MIXED = ["a", None, "b"]


class Choosy(nn.Module):
    """Takes six tokens at most."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(K, K), nn.Linear(K, K)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.relu(self.up(x))
        return {"logits": self.pick(h)}

    def pick(self, h: Tensor) -> Tensor:
        if h.shape[1] > 6:
            raise ValueError("too many tokens")
        return self.down(h)


class Broken(Choosy):
    def pick(self, h: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().pick(h)


def rows(length: int) -> Tensor:
    return torch.randn(3, length, K)


@pytest.mark.quick
@pytest.mark.parametrize("cls", [Choosy, Broken])
def test_a_bad_request_stops_nothing(small, cls):
    """Whether it comes before or after the graphs that serve the others."""
    case = small(cls, ["up", "down"])
    cm, x = case.compile(), rows(3)
    expected = case.expected(MIXED, {"x": x})
    for _ in range(2):
        with pytest.raises(ValueError, match="too many tokens"):
            cm(x=rows(7), adapter_names=["a"] * 3)
        assert error(cm(x=x, adapter_names=MIXED)["logits"], expected) <= 1e-5


@pytest.mark.quick
def test_graphs_stay(small):
    case = small(Choosy, ["up", "down"])
    cm, x = case.compile(), rows(3)
    cm(x=x, adapter_names=MIXED)
    assert cm.recompiles == 1
    for _ in range(3):
        with pytest.raises(ValueError, match="too many tokens"):
            cm(x=rows(7), adapter_names=["a"] * 3)
        pieces = cm.recompiles  # of the calls that raise
        cm(x=x, adapter_names=MIXED)
        assert cm.recompiles == pieces
    with pytest.raises(ValueError, match="too many tokens"):
        cm(x=rows(7), adapter_names=["a"] * 3)
    assert cm.recompiles == pieces


def _kept_out(call: Callable[..., Any]) -> Callable[..., Any]:
    return torch._dynamo.disable(call)


@pytest.mark.parametrize("changed", [functools.partial, _kept_out], ids=lambda f: f.__name__)
def test_forwards_that_are_no_functions(small, changed):
    """As tools that hook into a model leave them on the instance."""
    case = small(Choosy, ["up", "down"])
    model, x = case.model(), rows(3)
    model.forward = changed(model.forward)
    cm = lorafx.compile(model, case.folders, options=REFERENCE)
    assert error(cm(x=x, adapter_names=MIXED)["logits"], case.expected(MIXED, {"x": x})) <= 1e-5


def test_dynamo_switched_off(small, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    case = small(Choosy, ["up", "down"])
    cm, x, names = case.compile(), rows(3), ["b"] * 3
    assert error(cm(x=x, adapter_names=names)["logits"], case.expected(names, {"x": x})) <= 1e-5
    with pytest.raises(ProvenanceError, match="eager mode does not know"):
        cm(x=x, adapter_names=MIXED)
