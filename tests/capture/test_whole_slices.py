"""Loops over slices of layers: over all of them, some, and in another order."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from dynamo_graphs import captured
from torch import Tensor, nn

from lorafx.capture import whole_slices


class Layers(nn.Module):
    """Loops over slices that `which` gives; each layer is called at another place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.which = slice(None, 3)
        self.grows = False

    def forward(self, x: Tensor) -> Tensor:
        if self.grows:
            self.layers.append(self.layers[0])
        for place, layer in enumerate(self.layers[self.which]):
            x = torch.tanh(layer(x)) + place
        for layer in self.layers[self.which]:
            x = torch.tanh(layer(x))
        return x


X = torch.randn(3, 4)
NAMES = ["a", None, "b"]
WHOLE = [slice(None, 3), slice(None), slice(0, 9), slice(-3, None, 1)]
PART = [slice(None, 2), slice(1, None), slice(None, None, -1), slice(0, 3, 2), slice(3, 3)]


def run(case: Any, cm: Any) -> Tensor:
    got: Tensor = cm(X, adapter_names=NAMES)
    rows = [case.alone(name)(X[row : row + 1]) for row, name in enumerate(NAMES)]
    torch.testing.assert_close(got, torch.cat(rows), rtol=0, atol=1e-5)
    return got


def lines(graphs: list[list[str]]) -> list[str]:
    """Nodes without their places, and without the note that a module was made."""
    (graph,) = graphs
    return [re.sub(r"%\d+", "%", line) for line in graph if "_log_api_usage_once" not in line]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What was said of each slice that is looped over."""
    said: list[bool] = []
    ask = whole_slices._all

    def asked(*args: Any) -> bool:
        said.append(ask(*args))
        return said[-1]

    monkeypatch.setattr(whole_slices, "_all", asked)
    return said


@pytest.mark.parametrize("which", [*WHOLE, *PART], ids=str)
def test_the_graph_is_that_of_the_slice_as_it_stands(
    small: Any, monkeypatch: pytest.MonkeyPatch, taken: list[bool], which: slice
) -> None:
    case, found, results = small(Layers, ["layers.0", "layers.2"]), [], []
    for model in (case.base, case.alone("a"), case.alone("b")):
        model.which = which
    for looped in (whole_slices._looped_over, lambda _: False):
        with captured(monkeypatch) as one, monkeypatch.context() as patch:
            patch.setattr(whole_slices, "_looped_over", looped)
            results.append(run(case, case.compile(dynamic=False)))
        found.append(one)
    assert lines(found[0].graphs) == lines(found[1].graphs)
    assert torch.equal(*results)
    assert taken.count(True) == (which in WHOLE)  # of the two, the loop over the slice itself


def test_layers_that_the_call_itself_appends(small: Any, taken: list[bool]) -> None:
    case = small(Layers, ["layers.0"])
    cm = case.compile(dynamic=False)
    cm.model.grows = True
    run(case, cm)
    assert True not in taken
