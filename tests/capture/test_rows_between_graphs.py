"""Rows that Python moves, picks and joins between the graphs of a model, in mixed batches."""

from __future__ import annotations

import pytest
import torch
from dense_merge import REFERENCE, error
from torch import Tensor, nn

import lorafx
from lorafx.errors import ProvenanceError

K = 6
MIXED = ["a", None, "b"]


@torch._dynamo.disable
def rolled(h: Tensor, by: int) -> Tensor:
    return h[torch.arange(h.shape[0]).roll(by)]


@torch._dynamo.disable
def summed(h: Tensor) -> Tensor:
    return h + h.sum(0, keepdim=True) * 0


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(K, K)
        self.w = nn.Linear(K, K)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.first(x))
        torch._dynamo.graph_break()
        return {"logits": self.rest(h)}


class Reordered(Layers):
    """Each row is served by its own request's adapter, wherever it stands."""

    def rest(self, h: Tensor) -> Tensor:
        return rolled(self.w(rolled(h, 1)), -1)


class InPieces(Layers):
    """One request after another, and some of them together."""

    def rest(self, h: Tensor) -> Tensor:
        out = torch.zeros_like(h)
        for b in range(h.shape[0]):
            torch._dynamo.graph_break()
            out[b, :2] = self.w(h[b])[:2]
        for part in (slice(None, 1), slice(1, None)):
            torch._dynamo.graph_break()
            out[part, 2:] += self.w(h[part])[:, 2:]
        return out


class Experts(Layers):
    """Linears of experts in a loop over those that some row was routed to."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ModuleList(nn.Linear(K, K) for _ in range(3))
        self.router = nn.Linear(K, 3)

    def rest(self, h: Tensor) -> Tensor:
        rows = h.reshape(-1, K)
        weights, chosen = self.router(rows).softmax(-1).topk(2)
        out = torch.zeros_like(rows)
        for expert, layer in enumerate(self.w):
            row, place = torch.where(chosen == expert)
            out.index_add_(0, row, layer(rows[row]) * weights[row, place, None])
        return out.view(h.shape)


@pytest.mark.parametrize(
    ("cls", "targets"),
    [
        (Reordered, ["first", "w"]),
        (InPieces, ["first", "w"]),
        (Experts, ["first", "w.0", "w.1", "w.2", "router"]),
    ],
)
def test_rows_that_python_moves_keep_their_owners(small, cls, targets):
    torch.manual_seed(0)
    case = small(cls, targets)
    cm = lorafx.compile(case.model(), adapters=case.folders, options=REFERENCE)
    batches = [(["a"] * 3, 5), (MIXED, 5), (["b", "a", None], 4), (["b", "b", None, "a"], 4)]
    for names, length in batches:
        inputs = {"x": torch.randn(len(names), length, K)}
        found = cm(**inputs, adapter_names=names)["logits"]
        assert error(found, case.expected(names, inputs)) <= 1e-5, names


class InBuffer(Layers):
    """Rows cross from graph to graph in a buffer, in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(1, 1, K))

    def rest(self, h: Tensor) -> Tensor:
        if self.rows.shape != h.shape:
            self.rows.resize_(h.shape)
        turned = rolled(h, 1)
        self.rows.copy_(turned)
        torch._dynamo.graph_break()
        y, h = self.w(self.rows[: h.shape[0]]), h + 0
        torch._dynamo.graph_break()
        return rolled(y, -1) + 0 * h


class Summed(Layers):
    def rest(self, h: Tensor) -> Tensor:
        return self.w(summed(h))


@pytest.mark.usefixtures("fixed_sizes")
@pytest.mark.parametrize("cls", [Summed, InBuffer])
def test_what_has_no_one_owner_is_refused(small, cls):
    torch.manual_seed(0)
    case, inputs = small(cls, ["w"]), {"x": torch.randn(3, 5, K)}
    cm = lorafx.compile(case.model(), adapters=case.folders, options=REFERENCE)
    for names in (["a"] * 3, ["b"] * 3):
        found = cm(**inputs, adapter_names=names)["logits"]
        assert error(found, case.expected(names, inputs)) <= 1e-5
    with pytest.raises(ProvenanceError, match="at w "):
        cm(**inputs, adapter_names=MIXED)


class Cached(Layers):
    """Keeps in a dict what it computes of its own table in the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.linspace(-1, 1, K))
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if "bias" not in self.kept:
            self.kept["bias"] = self.computed(x)
        return {"logits": self.w(torch.tanh(self.first(x)) + self.kept["bias"])}

    def computed(self, x: Tensor) -> Tensor:
        return torch.exp(self.table)


class OfRequests(Cached):
    """What it keeps is of the first call's requests."""

    def computed(self, x: Tensor) -> Tensor:
        return x[:, :1].sin()


class OfWeight(Cached):
    """What it keeps is of a weight that adapters change."""

    def computed(self, x: Tensor) -> Tensor:
        return self.table * torch.ones_like(self.table) @ self.first(torch.eye(K))


def test_what_a_model_keeps_of_its_own_tensors_is_shared_by_later_calls(small):
    torch.manual_seed(0)
    case = small(Cached, ["first", "w"])
    model = case.model()
    cm = lorafx.compile(model, adapters=case.folders, options=REFERENCE)
    for names, length in ((["a"] * 3, 5), (MIXED, 5), (["b", "b", None, "a"], 4)):
        inputs = {"x": torch.randn(len(names), length, K)}
        found = cm(**inputs, adapter_names=names)["logits"]
        assert error(found, case.expected(names, inputs)) <= 1e-5, names
    model.kept["bias"].mul_(2)  # by somebody who may have taken it from a request
    with pytest.raises(ProvenanceError, match=r"at (first, )?w "):
        cm(**inputs, adapter_names=names)


@pytest.mark.usefixtures("fixed_sizes")
@pytest.mark.parametrize("cls", [OfRequests, OfWeight])
def test_what_a_model_keeps_of_requests_or_adapters_is_not_shared(small, cls):
    torch.manual_seed(0)
    case = small(cls, ["first", "w"])
    cm = lorafx.compile(case.model(), adapters=case.folders, options=REFERENCE)
    inputs = {"x": torch.randn(3, 5, K)}
    cm(**inputs, adapter_names=["a"] * 3)
    with pytest.raises(ProvenanceError, match=r"at (first, )?w "):
        cm(**inputs, adapter_names=MIXED)
