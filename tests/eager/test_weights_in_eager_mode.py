"""Uses of weights past their modules in eager mode, which answers only what it can prove.

Graphs are not compiled here: a call that asks for one raises. `tests/program/test_weight_bypasses`
has the same models in graphs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bypasses import (
    BATCHES,
    PAST,
    REFUSED,
    Past,
    beside,
    by_function,
    call_f,
    case_of,
    check,
    compile_prepared,
    compiled,
    exported,
    parametrised,
    past,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from lorafx.errors import BatchError
from lorafx.runtime.entry import Entry


class Asked(Exception):
    """The call asked for a graph."""


@pytest.fixture(autouse=True)
def _no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*args: Any, **kwargs: Any) -> None:
        raise Asked

    monkeypatch.setattr(Entry, "run_graph", ask)
    monkeypatch.setattr("lorafx.runtime.beside.compilers.can_fork", lambda: False)


UNPROVED = {
    **PAST,
    **REFUSED,
    "exported": past(call_f, exported),
    "by function": past(by_function),
    "compiled around the whole": past(
        call_f, lambda m: compiled(m, backend="eager", fullgraph=True)
    ),
    "compiled": past(call_f, lambda m: compiled(m, backend="eager")),
    "pruned beside the call": past(beside, lambda m: prune.identity(m.w, "weight")),
    "forward alone": past(lambda m, h: m.w.forward(h)),
    "returned": past(lambda m, h: m.w.weight),
}


@pytest.mark.parametrize("how", UNPROVED)
def test_a_use_past_the_module_asks_for_a_graph(how: str, small: Any) -> None:
    """With one adapter, with several, and for one row."""
    cm = compile_prepared(case_of(UNPROVED[how], small), start="eager")
    for names in reversed(BATCHES):
        with pytest.raises(Asked):
            cm(x=torch.randn(len(names), 3, 16), adapter_names=names)
    cm(x=torch.randn(2, 3, 16))  # without adapters it is the model's own


def warmed(model: Any) -> None:
    """Dynamo has a graph of the function before the call."""
    compiled(model, backend="eager", dynamic=False)
    with torch.no_grad():
        model.f(torch.zeros(4, 3, 16))


PROVED = {
    "parametrised": past(None, parametrised),
    "pruned": past(None, lambda m: prune.identity(m.w, "weight")),
    "exported to numpy before": past(None, lambda m: m.w.weight.detach().numpy()),
    "compiled by itself": past(
        lambda m, h: m.f(h),
        lambda m: setattr(m, "f", torch.compile(lambda h: m.w(h), backend="eager")),
    ),
    "hook that reads the result": past(
        None, lambda m: m.w.register_forward_hook(lambda m, a, y: y * 2)
    ),
}


@pytest.mark.parametrize("how", PROVED)
def test_a_use_by_the_module_is_answered_at_once(how: str, small: Any) -> None:
    case = case_of(PROVED[how], small)
    cm = compile_prepared(case, start="eager")
    for names in BATCHES:
        check(cm, case, names)


def test_copies_are_compared_once(small: Any) -> None:
    """And results of calls never are."""
    held = past(lambda m, h: m.w(h) + m.c, lambda m: setattr(m, "c", torch.randn(1, 3, 24)))
    cm = compile_prepared(case_of(held, small), start="eager")
    looked: list[Tensor] = []
    derived = cm._session.program.derived
    by_value = derived._by_value
    derived._by_value = lambda tensor, holder: looked.append(tensor) or by_value(tensor, holder)
    for names in BATCHES:
        cm(x=torch.randn(len(names), 3, 16), adapter_names=names)
    assert [tuple(item.shape) for item in looked] == [(1, 3, 24)]


def replaced(model: Any) -> None:
    model.w.forward = lambda h: torch.relu(by_function(model, h))


CHANGES = {
    "another forward": replaced,
    "a hook before the mark": lambda m: m.w.register_forward_hook(
        lambda module, args, y: y * 2, prepend=True
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_module_that_is_changed_after_compiling_asks_for_a_graph(change: str, small: Any) -> None:
    """The mark gets no product any more."""
    cm = compile_prepared(case_of(Past, small), start="eager")
    CHANGES[change](cm._orig_mod)
    for names in BATCHES:
        with pytest.raises(Asked):
            cm(x=torch.randn(len(names), 3, 16), adapter_names=names)


def turned(weight: Tensor, x: Tensor) -> Tensor:
    return (weight @ x.flatten(0, 1).T).T.unflatten(0, x.shape[:2])


#: Forwards of a linear (16, 24), and whether the mark can add its delta to what they return.
FORWARDS: dict[str, tuple[Callable[[Any, Tensor], Tensor], bool]] = {
    "linear": (lambda w, x: F.linear(x, w.weight, w.bias), True),
    "without bias": (lambda w, x: F.linear(x, w.weight), True),
    "addmm": (lambda w, x: torch.addmm(w.bias, x[0], w.weight.T)[None], True),
    "mm": (lambda w, x: torch.mm(x[0], w.weight.T)[None], True),
    "bmm": (lambda w, x: torch.bmm(x, w.weight.T.expand(len(x), -1, -1)), True),
    "baddbmm": (lambda w, x: torch.baddbmm(w.bias, x, w.weight.T.expand(len(x), -1, -1)), True),
    "einsum": (lambda w, x: torch.einsum("btk,nk->btn", x, w.weight), True),
    "of a copy": (lambda w, x: F.linear(x, w.weight.clone().contiguous(), w.bias), True),
    "from the left": (lambda w, x: turned(w.weight, x), False),
    "alpha": (lambda w, x: torch.addmm(w.bias, x[0], w.weight.T, alpha=2)[None], False),
    "half": (lambda w, x: F.linear(x[..., :8], w.weight[:, :8]), False),
    "then changed": (lambda w, x: F.linear(x, w.weight, w.bias).relu_(), False),
}


@pytest.mark.parametrize("how", FORWARDS)
def test_a_forward_of_its_own_is_read_by_the_rules_of_graphs(how: str, small: Any) -> None:
    """Its value is compared once, in the first call; which product it is, in each."""
    forward, proved = FORWARDS[how]

    class Linear(nn.Linear):
        later = False

        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x) if self.later else F.linear(x, self.weight, self.bias)

    class Model(Past):
        def __init__(self) -> None:
            super().__init__()
            self.w = Linear(16, 24)

    case = case_of(Model, small)
    cm = compile_prepared(case, start="eager")
    cm(x=torch.randn(1, 3, 16), adapter_names=["a"])
    Linear.later = True
    if proved:
        return check(cm, case, ["b"])
    with pytest.raises(Asked):
        cm(x=torch.randn(1, 3, 16), adapter_names=["b"])


class InThread(Past):
    def use(self, h: Tensor) -> Tensor:
        def call() -> None:
            try:
                self.w(h)
            except BatchError as error:
                errors.append(error)

        errors: list[BatchError] = []
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        raise errors[0]


def test_a_module_that_runs_on_another_thread_raises_there(small: Any) -> None:
    cm = compile_prepared(case_of(InThread, small), start="eager")
    with pytest.raises(BatchError, match="while another thread is in a call"):
        cm(x=torch.randn(1, 3, 16), adapter_names=["a"])
