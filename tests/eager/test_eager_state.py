"""What an eager forward changes, which is as before where a graph must serve the call after it."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, OrderedDict, deque
from typing import Any

import numpy as np
import pytest
import torch
from dense_merge import REFERENCE, TOLERANCE, error
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import lorafx
from lorafx.capture.missed import Missed
from lorafx.eager.undo import Undo

K = 6
CPU = torch.device("cpu")


class Unproved(nn.Module):
    """Eager mode gives up in the middle: it follows no forward that is called past its module."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(K, K)

    def state(self) -> float:
        """Changes the state, and returns a number that depends on it."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.w.forward(x) * self.state()}


class Calls(Unproved):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def state(self) -> float:
        self.calls += 1
        return self.calls


class Bound(Unproved):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("b", torch.ones(()))

    def state(self) -> Any:
        self.b = self.b + 1
        return self.b


class Lists(Unproved):
    def __init__(self) -> None:
        super().__init__()
        self.grown: list[int] = []
        self.last: deque[int] = deque(maxlen=3)
        self.by_name: dict[str, list[int]] = {"a": []}

    def state(self) -> float:
        self.grown.append(1)
        self.last.append(1)
        self.by_name["a"].append(1)
        return len(self.grown) + len(self.last) + len(self.by_name["a"])


@pytest.mark.parametrize("model", [Calls, Bound, Lists])
def test_a_forward_that_runs_twice_counts_once(small: Any, model: type[Unproved]) -> None:
    torch._dynamo.reset()
    case = small(model, ["w"])
    cm = case.compile({"start": "eager", "cache": None})
    x = torch.randn(3, K)
    got = cm(x=x, adapter_names=["a"] * 3)["logits"]
    assert cm.status().kinds[0].reason.startswith("compiled in this process")
    with torch.no_grad():
        want = case.alone("a")(x=x)["logits"]
    assert error(got, want) <= TOLERANCE


@dataclasses.dataclass(slots=True)
class Slotted:
    calls: int = 0


class Everything(nn.Module):
    """Changes all kinds of state, and then does what neither eager mode nor a graph can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(K, K)
        self.register_buffer("b", torch.zeros(2))
        self.held = [{"set": {1}, "slots": Slotted(), "parts": [nn.Identity()]}]
        self.counter, self.array = Counter("a"), np.zeros(3)
        self.torchs = torch.Generator().manual_seed(3)
        self.numpys = np.random.default_rng(3)
        self.pythons = random.Random(3)
        calls: list[int] = []
        self.called = lambda: calls.append(1) or len(calls)

    runs = 0  # of the class, which is not restored

    @torch._dynamo.disable
    def change(self, x: Tensor, outputs: BaseModelOutput) -> None:
        Everything.runs += 1
        self.b += 1
        self.b = self.b + 1
        self.register_buffer("late", torch.zeros(1))
        self.new, self.w.calls = x, 1
        self.array += 1
        self.counter["a"] += 1
        (held,) = self.held
        held["set"].add(2)
        held["slots"].calls += 1
        held["parts"][0].calls = 1
        self.called()
        outputs["hidden_states"] = (x,)
        outputs.last_hidden_state.add_(1)

    @torch._dynamo.disable
    def draw(self) -> list[float]:
        torchs = float(torch.rand((), generator=self.torchs))
        others = [self.numpys.random(), self.pythons.random(), np.random.random(), random.random()]
        return [torchs, float(torch.rand(())), *others]

    def forward(self, x: Tensor, outputs: BaseModelOutput) -> dict[str, Tensor]:
        self.change(x, outputs)
        self.draw()
        return {"logits": self.w(x.gather(0, x[:, :1].argsort(0).expand_as(x)))}


def state_of(model: Everything) -> Any:
    (held,) = model.held
    return (
        model.b.tolist(), sorted(dict(model.named_buffers())), sorted(vars(model)),
        sorted(vars(model.w)), model.array.tolist(), dict(model.counter), sorted(held["set"]),
        held["slots"].calls, hasattr(held["parts"][0], "calls"),
    )  # fmt: skip


def seed() -> None:
    for seeded in (torch.manual_seed, np.random.seed, random.seed):
        seeded(0)


def test_a_refused_call_has_changed_nothing(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = small(Everything, ["w"])
    model, x = case.model(), torch.randn(3, K)
    cm = lorafx.compile(model, case.folders, options={**REFERENCE, "start": "eager"})

    def no_graph(_: Any, call: Any, conversion: Any = None) -> Missed | None:
        """In place of the graph that is asked for next, which would change the state as well."""
        return None if conversion is None else Missed()

    monkeypatch.setattr("lorafx.runtime.entry.Entry.run_graph", no_graph)
    outputs = BaseModelOutput(last_hidden_state=torch.zeros(3, K))
    before, buffer = state_of(model), model.b
    runs = Everything.runs
    seed()
    assert cm(x=x, outputs=outputs, adapter_names=["a", None, "b"]) is None
    assert Everything.runs == runs + 1
    drawn = model.draw()
    seed()
    assert drawn == case.model().draw()
    assert state_of(model) == before
    assert model.b is buffer
    assert model.called() == 1
    assert list(outputs) == ["last_hidden_state"]
    assert outputs.hidden_states is None
    assert not outputs.last_hidden_state.any()


def test_what_a_forward_has_changed_is_undone_after_it_too() -> None:
    model, outputs = Everything(), BaseModelOutput(last_hidden_state=torch.zeros(2, K))
    before, buffer = state_of(model), model.b.clone()
    undo = Undo((model, outputs), CPU)
    undo.note([model.b, outputs.last_hidden_state])
    model.change(torch.ones(2, K), outputs)
    undo.run()
    undo.run()
    assert torch.equal(model.b, buffer)
    assert state_of(model) == before
    assert OrderedDict(outputs) == {"last_hidden_state": outputs.last_hidden_state}


def test_hooks_that_a_forward_registers_are_undone_with_what_tells_of_them() -> None:
    """transformers registers hooks in the first call that records outputs, and notes that it has:
    hooks that stayed without the note would record each output twice."""
    model = nn.Sequential(nn.Linear(K, K), Calls())
    model[0].register_forward_hook(lambda *_: None)
    modules = [model, *model, model[1].w]
    before = [len(module._forward_hooks) for module in modules]
    undo = Undo((model,), CPU, trusted=True)
    for module in modules:
        module.register_forward_hook(lambda *_: None)
        module.register_forward_pre_hook(lambda *_: None)
    undo.run()
    assert [len(module._forward_hooks) for module in modules] == before
    assert not any(module._forward_pre_hooks for module in modules)


def test_memory_that_a_tensor_gets_is_taken_from_it_again() -> None:
    """And what it came from keeps its numbers."""
    x, other = torch.ones(3), torch.zeros(3)
    undo, address = Undo((), CPU), x.data_ptr()
    undo.note([x])
    x.set_(other)
    undo.run()
    assert x.data_ptr() == address
    assert (x.tolist(), other.tolist()) == ([1.0] * 3, [0.0] * 3)
