"""Rows that Python moves, picks and joins between the graphs of a model, in mixed batches."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from attached import compiled, fresh_dynamo, served  # noqa: F401  (the fixture)
from dense_merge import REFERENCE, Case, error
from slowly import few
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


def serving(case: Case) -> lorafx.CompiledModel:
    return lorafx.compile(case.model(), adapters=case.folders, options=REFERENCE)


def check(cm: lorafx.CompiledModel, case: Case, batches: Sequence[tuple[Any, int]]) -> None:
    """Right answers for batches of these names and lengths."""
    for names, length in batches:
        inputs = {"x": torch.randn(len(names), length, K)}
        found = cm(**inputs, adapter_names=names)["logits"]
        assert error(found, case.expected(names, inputs)) <= 1e-5, names


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
    few(
        [
            (Reordered, ["first", "w"]),
            (InPieces, ["first", "w"]),
            (Experts, ["first", "w.0", "w.1", "w.2", "router"]),
        ],
        Reordered,
    ),
)
def test_rows_that_python_moves_keep_their_owners(small, cls, targets):
    torch.manual_seed(0)
    case = small(cls, targets)
    batches = [(["a"] * 3, 5), (MIXED, 5), (["b", "a", None], 4), (["b", "b", None, "a"], 4)]
    check(serving(case), case, batches)


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


@pytest.mark.parametrize("cls", [Summed, InBuffer])
def test_what_has_no_one_owner_is_refused(small, cls):
    torch.manual_seed(0)
    case, inputs = small(cls, ["w"]), {"x": torch.randn(3, 5, K)}
    cm = serving(case)
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
    cm = serving(case)
    check(cm, case, [(["a"] * 3, 5), (MIXED, 5), (["b", "b", None, "a"], 4)])
    cm._orig_mod.kept["bias"].mul_(2)  # by somebody who may have taken it from a request
    with pytest.raises(ProvenanceError, match=r"at (first, )?w "):
        cm(x=torch.randn(3, 5, K), adapter_names=MIXED)


@pytest.mark.parametrize("cls", [OfRequests, OfWeight])
def test_what_a_model_keeps_of_requests_or_adapters_is_not_shared(small, cls):
    torch.manual_seed(0)
    case = small(cls, ["first", "w"])
    cm = serving(case)
    inputs = {"x": torch.randn(3, 5, K)}
    cm(**inputs, adapter_names=["a"] * 3)
    with pytest.raises(ProvenanceError, match=r"at (first, )?w "):
        cm(**inputs, adapter_names=MIXED)


def by_numpy(h: Tensor) -> None:
    rows = h.detach().numpy()
    rows[:] = rows[::-1].copy()


def by_dlpack(h: Tensor) -> None:
    rows = np.from_dlpack(h)
    rows[:] = rows[::-1].copy()


def by_address(h: Tensor) -> None:
    turned = h.flip(0)
    ctypes.memmove(h.data_ptr(), turned.data_ptr(), h.nbytes)


def by_storage(h: Tensor) -> None:
    turned = h.flip(0).untyped_storage()
    h.untyped_storage().copy_(turned)


WRITERS = [by_numpy, by_dlpack, by_address, by_storage]


class Written(Layers):
    """Python hands the memory of its rows to code that is not followed, which moves them."""

    write: Callable[[Tensor], None]

    def rest(self, h: Tensor) -> Tensor:
        self.written(h)
        return self.w(h)

    @torch._dynamo.disable
    def written(self, h: Tensor) -> None:
        type(self).write(h)


def writing(write: Callable[[Tensor], None], cls: type[Written] = Written) -> type[Written]:
    return type(cls.__name__, (cls,), {"write": staticmethod(write)})


@pytest.mark.parametrize("write", WRITERS)
def test_rows_that_are_moved_unseen_are_refused(small, write):
    torch.manual_seed(0)
    case, inputs = small(writing(write), ["w"]), {"x": torch.randn(3, 5, K)}
    cm = serving(case)
    with pytest.raises(ProvenanceError, match=r"at w "):
        cm(**inputs, adapter_names=MIXED)
    cm(**inputs, adapter_names=["a"] * 3)
    with pytest.raises(ProvenanceError, match=r"at w "):
        cm(**inputs, adapter_names=MIXED)


class Read(Written):
    """Python reads between the graphs, and moves rows in ways that are seen."""

    def rest(self, h: Tensor) -> Tensor:
        self.written(h)
        h = h[torch.arange(h.shape[0]).roll(1)]
        torch._dynamo.graph_break()
        return self.w(h).roll(-1, 0)


def read_by_address(h: Tensor) -> None:
    assert len(ctypes.string_at(h.data_ptr(), h.nbytes)) == h.untyped_storage().nbytes()
    assert np.isfinite(np.from_dlpack(h)).all()


def test_what_is_only_read_keeps_its_owners(small):
    torch.manual_seed(0)
    case = small(writing(read_by_address, Read), ["first", "w"])
    check(serving(case), case, [(["a"] * 3, 5), (MIXED, 5), (["b", "a", None], 5)])


def test_the_same_of_a_marked_model(small):
    torch.manual_seed(0)
    case, inputs = small(writing(by_numpy), ["w"]), {"x": torch.randn(3, 5, K)}
    model = lorafx.attach(case.model(), adapters=case.folders, options=REFERENCE)
    call = compiled(model, dynamic=False)
    found = served(call, model, [None] * 3, inputs)
    assert torch.equal(found, case.base(**inputs)["logits"])
    with pytest.raises(ProvenanceError, match=r"at w "):
        served(call, model, MIXED, inputs)
