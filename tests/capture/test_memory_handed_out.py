"""Memory of tensors that Python hands to code that is not followed, between the graphs of a model,
in mixed batches."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
import torch
from dense_merge import REFERENCE, error
from torch import Tensor, nn

import lorafx
from lorafx.errors import ProvenanceError

K = 6
MIXED = ["a", None, "b"]


def by_numpy(h: Tensor) -> None:
    rows = h.detach().numpy()
    rows[:] = rows[::-1].copy()


def sorted_in_place(h: Tensor) -> None:
    h.detach().numpy().sort(0)


def shuffled(h: Tensor) -> None:
    np.random.default_rng(0).shuffle(h.numpy())


def by_protocol(h: Tensor) -> None:
    rows = np.asarray(h)
    rows[:] = rows[::-1].copy()


def by_view_of_numpy(h: Tensor) -> None:
    rows = torch.from_numpy(h.numpy())
    rows.copy_(rows.flip(0))


def by_dlpack(h: Tensor) -> None:
    rows = np.from_dlpack(h)
    rows[:] = rows[::-1].copy()


def by_capsule(h: Tensor) -> None:
    rows = torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(h))
    rows.copy_(rows.flip(0))


def by_address(h: Tensor) -> None:
    turned = h.flip(0)
    ctypes.memmove(h.data_ptr(), turned.data_ptr(), h.nbytes)


def by_storage(h: Tensor) -> None:
    turned = h.flip(0).untyped_storage()
    h.untyped_storage().copy_(turned)


def by_bytes(h: Tensor) -> None:
    size = h.nbytes
    memory = memoryview((ctypes.c_char * size).from_address(h.data_ptr())).cast("B")
    memory[:] = bytes(memory[size // 3 :]) + bytes(memory[: size // 3])


WRITERS = [
    by_numpy,
    sorted_in_place,
    shuffled,
    by_protocol,
    by_view_of_numpy,
    by_dlpack,
    by_capsule,
    by_address,
    by_storage,
    by_bytes,
]


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
@pytest.mark.parametrize("first", ["mixed", "alone"])
@pytest.mark.parametrize("write", WRITERS)
def test_rows_that_are_moved_unseen_are_refused(small, write, first):
    torch.manual_seed(0)
    case, inputs = small(writing(write), ["w"]), {"x": torch.randn(3, 5, K)}
    cm = lorafx.compile(case.model(), adapters=case.folders, options=REFERENCE)
    if first == "alone":
        cm(**inputs, adapter_names=["a"] * 3)
    with pytest.raises(ProvenanceError, match=r"at w "):
        cm(**inputs, adapter_names=MIXED)
    with pytest.raises(ProvenanceError, match=r"at w "):
        cm(**inputs, adapter_names=MIXED)
