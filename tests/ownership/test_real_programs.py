"""Labels of what runs in Python, operator by operator, against brute-force taint.

Random programs run eagerly under `Following`, and again with one request's input changed: no
element may move that a label gives to another request or to nobody. What is remembered of one
program serves the next.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_programs import TABLE, K, program
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorafx.eager.following import Following
from lorafx.eager.known_labels import KnownLabels
from lorafx.ownership.effects import tensors_in
from lorafx.ownership.memory import Memory
from lorafx.ownership.real_labels import RealLabel, cells_of, listed

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
@settings(max_examples=15, derandomize=True)
@given(seed=st.integers(0, 10**9), length=st.integers(2, 8), dim=st.integers(0, 1))
def test_no_label_is_contradicted(mode, seed, length, dim):
    judge(mode, program(seed, length), dim, seed)


ORDER = torch.tensor([2, 0, 1])


def label_and_moves(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    dim: int,
    request: int,
    shared: Iterable[Tensor] = (),
) -> tuple[RealLabel | None, Tensor]:
    """The label of a program's result, and which of its elements move with a request."""
    memory = Memory()
    memory.add_shared([ORDER, *shared])
    memory.note(x, listed(dim, tuple(range(x.shape[dim]))))
    with torch.no_grad(), Following(memory) as following:
        before = run(x)
        label = following.label(before)
    changed = x.clone()
    changed.select(dim, request).mul_(-0.5)
    with torch.no_grad():
        return label, ~torch.isclose(before, run(changed), rtol=1e-9, atol=1e-9)


def in_place_views(x: Tensor) -> Tensor:
    """A leading dimension that is dropped in place: the sizes do not say which one is owned."""
    return (x[None] * 2).squeeze_(0).transpose_(0, 1).t_().unsqueeze_(1).squeeze_(1)


def restrided(x: Tensor) -> Tensor:
    pooled = x[:, :, None, None].mean((-1, -2), keepdim=True)
    return pooled.as_strided_((len(x), x.shape[1], 1, 1), (x.shape[1], 1, 1, 1)).flatten(1)


def loop(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    for i in range(len(x)):
        y[i] = x[i].tanh()
    return y


def in_a_buffer(x: Tensor) -> Tensor:
    buffer = torch.zeros(7, x.shape[1], dtype=x.dtype)
    buffer[: len(x)] = x
    return (buffer * 2)[: len(x)]


def in_an_out(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    torch.mul(x, 2, out=y)
    return torch.sum(y[:, None], 1, out=torch.empty_like(x))


#: Programs of x (B, F) that move the requests -> the request of each row of the result.
MOVING: dict[Callable[[Tensor], Tensor], tuple[int, ...]] = {
    in_place_views: (0, 1, 2),
    restrided: (0, 1, 2),
    loop: (0, 1, 2),
    in_a_buffer: (0, 1, 2),
    in_an_out: (0, 1, 2),
    lambda x: x[ORDER]: (2, 0, 1),
    lambda x: x.flip(0): (2, 1, 0),
    lambda x: torch.rot90(x, 2): (2, 1, 0),
    lambda x: x.roll(1, 0): (2, 0, 1),
    lambda x: torch.cat(x.chunk(2)[::-1]): (2, 0, 1),
    lambda x: torch.cat([part * 2 for part in x.split([1, 2])]): (0, 1, 2),
    lambda x: x.gather(0, ORDER[:, None].expand(3, 3)): (2, 0, 1),
    lambda x: x.take(ORDER * 3): (2, 0, 1),
    lambda x: torch.zeros_like(x).scatter(0, ORDER[:, None].expand(3, 3), x): (1, 2, 0),
    lambda x: x[x.sum(1).argsort()][x.sum(1).argsort().argsort()]: (0, 1, 2),
}


@pytest.mark.parametrize("run", MOVING)
def test_rows_that_are_moved(run: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for request in range(3):
        label, moves = label_and_moves(run, x, 0, request)
        assert label == listed(0, MOVING[run])
        of_request = torch.tensor(MOVING[run]) == request
        assert torch.equal(moves.flatten(1).any(1) if moves.dim() > 1 else moves, of_request)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["batch first", "time first", "packed", "states", "last state"])
@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
def test_recurrent_layers(kind: Any, form: str, dtype: torch.dtype) -> None:
    """As many steps as requests, which sizes cannot tell apart."""
    torch.manual_seed(0)
    several = form != "states"
    dim = int(form == "time first")
    layer = kind(4, 5, 1 + several, batch_first=not dim, bidirectional=several, dtype=dtype).eval()
    lengths = torch.tensor([2, 3, 1])

    def run(x: Tensor) -> Tensor:
        if form == "packed":
            packed = torch.nn.utils.rnn.pack_padded_sequence(
                x, lengths, batch_first=True, enforce_sorted=False
            )
            result, states = layer(packed)
            result = torch.nn.utils.rnn.pad_packed_sequence(result, batch_first=True)[0]
        else:
            state = x[None, :, 0, :1].expand(1, 3, 5).contiguous()
            pair = (state, state * 2) if kind is torch.nn.LSTM else state
            result, states = layer(x, pair) if form == "states" else layer(x)
        last = states[-1] if isinstance(states, tuple) else states
        return last if form == "last state" else result

    x = torch.randn(3, 3, 4, dtype=dtype)
    result_dim = 1 if form == "last state" else dim
    for request in range(3):
        label, moves = label_and_moves(run, x, dim, request, [lengths, *layer.parameters()])
        assert label == listed(result_dim, (0, 1, 2))
        others = moves.movedim(result_dim, 0)[[i for i in range(3) if i != request]]
        assert not bool(others.any())


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
