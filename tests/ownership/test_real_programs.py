"""Labels of what runs in Python, operator by operator, against brute-force taint.

Random programs run eagerly under `Following`, and again with one request's input changed: no
element may move that a label gives to another request or to nobody. What is remembered of one
program serves the next.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_programs import TABLE, K, program
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorafx.eager.following import Following
from lorafx.eager.known_labels import KnownLabels
from lorafx.ownership.memory import Memory, RealLabel, cells_of, listed
from lorafx.ownership.real import tensors_in

FRESH = (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty)


class Seeing(TorchDispatchMode):
    """Keeps every result and what it was said to hold."""

    seen: list[tuple[str, Tensor, RealLabel | None]]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = super().__torch_dispatch__(func, types, args, kwargs)
        for result in tensors_in(results):
            self.seen.append((str(func), result.clone(), self.label(result)))
        return results

    def label(self, tensor: Tensor) -> RealLabel | None:
        raise NotImplementedError


class Recording(Seeing, Following):
    def __init__(self, memory: Memory) -> None:
        super().__init__(memory)
        self.seen = []

    def label(self, tensor: Tensor) -> RealLabel | None:
        return Following.label(self, tensor)


REMEMBERED = KnownLabels()


class Remembering(Recording):
    def __init__(self, memory: Memory) -> None:
        Following.__init__(self, memory, remembered=REMEMBERED, watched=False)
        self.seen = []


class SameOrder(TorchDispatchMode):
    """Sorts everybody's rows as they were sorted in the first run: order is not content."""

    def __init__(self, orders: list[Tensor], first: bool) -> None:
        super().__init__()
        self.orders, self.first = orders, first

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func.overloadpacket in FRESH:
            return results.zero_()  # fresh memory differs from run to run
        if func.overloadpacket is not torch.ops.aten.sort or args[0].dim() != 1:
            return results
        if self.first:
            self.orders.append(results[1])
            return results
        order = self.orders.pop(0)
        return args[0][order], order


def record(
    mode: Callable[[Memory], Recording | Remembering],
    run: Callable[[Tensor], Any],
    x: Tensor,
    dim: int,
    orders: list[Tensor],
    *,
    first: bool,
) -> list[tuple[str, Tensor, RealLabel | None]]:
    memory = Memory(shared=lambda tensor: tensor is TABLE)
    memory.note(x, listed(dim, tuple(range(x.shape[dim]))))
    with SameOrder(orders, first), mode(memory) as recording:
        run(x)
    return recording.seen


def contradicted(
    before: list[tuple[str, Tensor, RealLabel | None]],
    after: list[tuple[str, Tensor, RealLabel | None]],
    request: int,
) -> list[str]:
    """Operators of whose results an element moved that is not `request`'s by its label."""
    found = []
    for (name, a, held), (_, b, _) in zip(before, after, strict=True):
        if held is None:
            continue
        moved = ~torch.isclose(a.double(), b.double(), rtol=1e-9, atol=1e-9, equal_nan=True)
        if bool((moved & (cells_of(held, a.dim(), a.device) != request)).any()):
            found.append(f"{name}: {held}")
    return found


def judge(
    mode: Callable[[Memory], Recording | Remembering],
    run: Callable[[Tensor], Any],
    dim: int,
    seed: int,
) -> list[RealLabel | None]:
    """The labels of a program on several sizes, none of which taint contradicts."""
    helds: list[RealLabel | None] = []
    for batch, time in ((3, 5), (2, 4), (3, 3)):
        shape = [time, time, K]
        shape[dim] = batch
        before = torch.randn(shape, dtype=torch.float64)
        after, request = before.clone(), seed % batch
        after.select(dim, request).copy_(torch.randn_like(after.select(dim, request)))
        orders: list[Tensor] = []
        first = record(mode, run, before, dim, orders, first=True)
        second = record(mode, run, after, dim, orders, first=False)
        assert contradicted(first, second, request) == [], f"seed {seed}, sizes {shape}"
        helds += [held for *_, held in first]
    return helds


@pytest.mark.parametrize("mode", [Recording, Remembering])
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(seed=st.integers(0, 10**9), length=st.integers(2, 8), dim=st.integers(0, 1))
def test_no_label_is_contradicted(mode, seed, length, dim):
    judge(mode, program(seed, length), dim, seed)


@pytest.mark.parametrize("operate", [lambda x: x * 2, lambda x: x.sort()[1], lambda x: x @ x.T])
def test_labels_keep_no_tensor_alive(operate: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 4)
    memory = Memory()
    memory.set_label(x, listed(0, (0, 1, 2)))
    gc.disable()
    try:
        result = weakref.ref(Following(memory).run(lambda: operate(x)))
        assert result() is None
    finally:
        gc.enable()
