"""Memory of tensors that Python hands to code that is not followed, between the graphs of a model,
in mixed batches."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
import torch
from attached import compiled, fresh_dynamo, served
from dense_merge import REFERENCE, error
from torch import Tensor, nn

import lorafx
from lorafx.errors import ProvenanceError

__all__ = ["fresh_dynamo"]

K = 6
MIXED = ["a", None, "b"]


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


class Written(nn.Module):
    """Its rows change places between two graphs, as `write` says."""

    write: Callable[[Tensor], None]

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(K, K)
        self.w = nn.Linear(K, K)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.rest(torch.tanh(self.first(x)))}

    def rest(self, h: Tensor) -> Tensor:
        self.written(h)
        return self.w(h)

    @torch._dynamo.disable
    def written(self, h: Tensor) -> None:
        type(self).write(h)


def writing(write: Callable[[Tensor], None], cls: type[Written] = Written) -> type[Written]:
    return type(cls.__name__, (cls,), {"write": staticmethod(write)})


@pytest.mark.usefixtures("fixed_sizes")
@pytest.mark.parametrize("write", WRITERS)
def test_rows_that_are_moved_unseen_are_refused(small, write):
    torch.manual_seed(0)
    case, inputs = small(writing(write), ["w"]), {"x": torch.randn(3, 5, K)}
    cm = lorafx.compile(case.model(), adapters=case.folders, options=REFERENCE)
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


@pytest.mark.usefixtures("fixed_sizes")
def test_what_is_only_read_keeps_its_owners(small):
    torch.manual_seed(0)
    case, inputs = (
        small(writing(read_by_address, Read), ["first", "w"]),
        {"x": torch.randn(3, 5, K)},
    )
    cm = lorafx.compile(case.model(), adapters=case.folders, options=REFERENCE)
    for names in (["a"] * 3, MIXED, ["b", "a", None]):
        found = cm(**inputs, adapter_names=names)["logits"]
        assert error(found, case.expected(names, inputs)) <= 1e-5, names


@pytest.mark.usefixtures("fresh_dynamo")
def test_the_same_of_a_marked_model(small):
    torch.manual_seed(0)
    case, inputs = small(writing(by_numpy), ["w"]), {"x": torch.randn(3, 5, K)}
    model = lorafx.attach(case.model(), adapters=case.folders, options=REFERENCE)
    call = compiled(model, dynamic=False)
    found = served(call, model, [None] * 3, inputs)
    assert torch.equal(found, case.base(**inputs)["logits"])
    with pytest.raises(ProvenanceError, match=r"at w "):
        served(call, model, MIXED, inputs)
