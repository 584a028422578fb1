"""Models that break into several graphs, by both roads: `lorafx.compile`, and torch.compile with
the backend. Graphs are shared by layers and by calls; what one was captured for is not what it is
called for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attached import fresh_dynamo  # noqa: F401  (the fixture)
from dense_merge import REFERENCE, Case, error
from slowly import few
from torch import Tensor, nn

import lorafx
from lorafx.errors import CaptureError, ProvenanceError

Serve = Callable[[Sequence["str | None"] | None, dict[str, Tensor]], Tensor]
K = 6
MIXED = ["a", None, "b"]


def serve_of(case: Case, config: Any = None, *, fixed: bool = False) -> Serve:
    """`fixed`: for inputs of one size each."""
    sizes = {"dynamic": False} if fixed else {}
    cm = lorafx.compile(case.model(), config, adapters=case.folders, options=REFERENCE, **sizes)
    return lambda names, inputs: cm(**inputs, adapter_names=names)["logits"]


def right(serve: Serve, case: Case, names: Sequence[str | None], inputs: dict[str, Tensor]) -> None:
    assert error(serve(names, inputs), case.expected(names, inputs)) <= 1e-5


def features(rows: int, length: int) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, length, K)}


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(K, K)
        self.w = nn.Linear(K, K)


class Broken(One):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.first(x))
        torch._dynamo.graph_break()
        return {"logits": self.w(h.transpose(0, 1)).transpose(0, 1)}


@pytest.mark.parametrize("targets", [["first", "w"], ["w"]])
@pytest.mark.parametrize("base_first", few([True, False], False))
def test_owners_are_handed_over(small, targets, base_first):
    """Also by a part without LoRA, and by one that calls without adapters captured."""
    torch.manual_seed(0)
    case, inputs = small(Broken, targets), features(3, 4)
    serve = serve_of(case)
    if base_first:
        assert torch.equal(serve(None, inputs), case.base(**inputs)["logits"])
    right(serve, case, MIXED, inputs)
    right(serve, case, ["b", "b", None, "a"], features(4, 2))
    assert torch.equal(serve(None, inputs), case.base(**inputs)["logits"])


class Bypass(One):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": F.linear(x, self.w.weight, self.w.bias)}


def test_the_base_first_where_no_mark_stands_in_the_graph(small):
    """Dynamo has no guard to tell a call with adapters by: its base graph drops the delta."""
    torch.manual_seed(0)
    case, inputs = small(Bypass, ["w"]), features(3, 4)
    serve = serve_of(case, fixed=True)
    assert torch.equal(serve(None, inputs), case.base(**inputs)["logits"])
    right(serve, case, MIXED, inputs)
    assert torch.equal(serve(None, inputs), case.base(**inputs)["logits"])


class Unbreakable(One):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        try:
            with open(os.devnull):
                torch._dynamo.graph_break()
                y = self.w(x)
                torch._dynamo.graph_break()
        finally:
            torch._dynamo.graph_break()
        return {"logits": y}


def test_a_module_whose_frame_cannot_be_broken(small):
    torch.manual_seed(0)
    case, inputs = small(Unbreakable, ["w"]), features(3, 3)
    serve = serve_of(case, fixed=True)
    right(serve, case, ["a", "a", "a"], inputs)
    right(serve, case, ["b", "b", "b"], inputs)
    assert torch.equal(serve(None, inputs), case.base(**inputs)["logits"])


SWAPS = {"rows": False}


@torch._dynamo.disable
def _swapped(x: Tensor) -> Tensor:
    return x.flip(0).clone() if SWAPS["rows"] else x


class Rebound(One):
    """A local variable that held an argument when the graph was captured, and then does not."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        torch._dynamo.graph_break()
        x = _swapped(x)
        torch._dynamo.graph_break()
        return {"logits": self.w(x)}


def test_an_argument_that_is_something_else_in_another_call(small):
    torch.manual_seed(0)
    case, inputs = small(Rebound, ["w"]), features(3, 3)
    serve = serve_of(case)
    right(serve, case, MIXED, inputs)
    SWAPS["rows"] = True
    try:
        with pytest.raises(ProvenanceError, match="a tensor comes from another place than when"):
            serve(MIXED, inputs)
    finally:
        SWAPS["rows"] = False
    right(serve, case, MIXED, features(3, 5))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        # What follows a sum over requests belongs to none of them alone.
        return x + self.w(x + x.sum(0, keepdim=True) * 0)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = layer(x)
        return {"logits": x}


def test_a_refusal_holds_for_the_layer_that_runs(small):
    """All layers run one graph, captured for the first; the adapter touches another one."""
    torch.manual_seed(0)
    case, inputs = small(Stack, ["w"], ["layers.2.w"]), features(3, 3)
    serve = serve_of(case, fixed=True)
    right(serve, case, ["a", "a", "a"], inputs)
    with pytest.raises(ProvenanceError, match=r"at layers\.2\.w"):
        serve(["b", None, "b"], inputs)


def test_layers_with_lora_do_not_run_the_graph_of_one_without(small):
    """Dynamo does not tell them apart: it guards on hooks that are there, not on missing ones."""
    torch.manual_seed(0)
    case, inputs = small(Stack, ["layers.0.w"], ["layers.2.w"]), features(3, 3)
    with pytest.raises(CaptureError, match=r"layers\.2\.w shares a graph with a layer of the same"):
        serve_of(case, fixed=True)(["b", "b", "b"], inputs)
    torch._dynamo.reset()
    serve = serve_of(case, lorafx.LoraConfig(target_modules=["w"]), fixed=True)
    for name in ("b", "a"):
        right(serve, case, [name] * 3, inputs)
