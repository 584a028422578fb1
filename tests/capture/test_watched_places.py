"""A graph serves no call for which something that it was captured with has changed, though Dynamo
no longer compares what look-ups in dictionaries reach."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dense_merge import Case, case_by_targets
from torch import Tensor, nn

import lorafx
from lorafx.torch_internals.versions import saves_graphs

FACTOR = 1.0
CONSTANTS = SimpleNamespace(shift=0.0)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 1)
        self.register_buffer("offset", torch.rand(8))
        self.epsilon = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.offset + self.epsilon


class Doubled(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Model(nn.Module):
    """Layers that a loop runs, tables and constants of modules, objects and of this file."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.norm = Norm()
        self.scales = {"a": 3.0, "b": 2.0}
        self.settings = SimpleNamespace(sign=1.0)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        for name, scale in self.scales.items():
            x = x * scale if name == "a" else x + scale
        x = self.norm(x) * self.settings.sign * FACTOR + CONSTANTS.shift
        return -x if self.training else x


class Counting(Model):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) + self.calls


def case_of(model: nn.Module, folder: Path) -> Case:
    base = model.eval().requires_grad_(False)
    return case_by_targets(base, folder, {"a": r"layers\.0", "b": r"layers\.\d"})


@pytest.fixture
def case(tmp_path) -> Case:
    torch.manual_seed(0)
    return case_of(Model(), tmp_path)


X = torch.linspace(-1, 1, 24).view(3, 8)
NAMES = ["a", None, "b"]


def compiled(case: Case, shortcuts: list[str] | None = None) -> Any:
    model = case.model()
    cm = lorafx.compile(
        model, case.folders, options={"lowering": "reference", "shortcuts": shortcuts}
    )
    cm(X, adapter_names=NAMES)
    return cm


def watched(cm: Any) -> int:
    return sum(len(places.guards) for places in cm._session.program.watched_places)


def rebuilt_norm(model: Any) -> None:
    torch.manual_seed(7)
    model.norm = Norm().requires_grad_(False)


def other_weight(model: Any) -> None:
    model.norm.weight = nn.Parameter(torch.full((8,), 3.0), requires_grad=False)


def other_strides(model: Any) -> None:
    model.norm.weight.data = torch.arange(16.0)[::2]


def other_buffer(model: Any) -> None:
    model.norm.offset = torch.full((8,), -4.0)


def own_forward(model: Any) -> None:
    model.norm.forward = lambda x: x - 9


def longer(model: Any) -> None:
    torch.manual_seed(8)
    model.layers.append(nn.Linear(8, 8).requires_grad_(False))


def set_to(path: str, name: str, value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model.get_submodule(path), name, value)


CHANGES: dict[str, Callable[[Any], None]] = {
    "constant": set_to("norm", "epsilon", -2.0),
    "of an object": lambda model: setattr(model.settings, "sign", -1.0),
    "object": lambda model: setattr(model, "settings", SimpleNamespace(sign=-3.0)),
    "entry": lambda model: model.scales.update(b=-5.0),
    "further entry": lambda model: model.scales.update(c=7.0),
    "order of entries": lambda model: model.scales.update(a=model.scales.pop("a")),
    "table": lambda model: setattr(model, "scales", {"b": 0.5}),
    "module": rebuilt_norm,
    "parameter": other_weight,
    "strides": other_strides,
    "buffer": other_buffer,
    "forward": own_forward,
    "class": set_to("norm", "__class__", Doubled),
    "further module": longer,
    "mode": lambda model: model.train(),
    "global": lambda model: globals().update(FACTOR=4.0),
    "of a global": lambda model: setattr(CONSTANTS, "shift", 6.0),
}


#: Changes after which the graph still serves: it takes parameters and buffers as inputs.
SAME_GRAPH = (other_weight, other_buffer)


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "FACTOR", 1.0)
    monkeypatch.setattr(CONSTANTS, "shift", 0.0)


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
@pytest.mark.usefixtures("restored")
def test_a_change_is_noticed(case: Case, change: Callable[[Any], None]) -> None:
    """The next call is what the changed model computes, and takes as many graphs as with all of
    Dynamo's guards."""
    cm, plain, base = compiled(case), compiled(case, []), case.model()
    assert watched(cm) > 40
    assert watched(plain) == 0
    before = base(X[1:2])
    for model in (cm._orig_mod, plain.model, base):
        change(model)
    want = base(X[1:2])
    assert not torch.allclose(before, want)
    graphs = cm.recompiles
    torch.testing.assert_close(cm(X, adapter_names=NAMES)[1:2], want)
    torch.testing.assert_close(plain(X, adapter_names=NAMES)[1:2], want)
    # Dynamo would serve another module by the same graph, if it is equal.
    assert cm.recompiles == plain.recompiles + (change is rebuilt_norm)
    assert change in SAME_GRAPH or cm.recompiles > graphs
    graphs = cm.recompiles
    cm(X, adapter_names=NAMES)
    assert cm.recompiles == graphs


def test_a_change_back_has_its_graph(case: Case) -> None:
    cm = compiled(case)
    first = cm(X, adapter_names=NAMES)
    for _ in range(2):
        cm._orig_mod.norm.epsilon = -2.0
        cm._orig_mod.train()
        assert not torch.allclose(cm(X, adapter_names=NAMES), first)
        cm._orig_mod.norm.epsilon = 0.5
        cm._orig_mod.eval()
        torch.testing.assert_close(cm(X, adapter_names=NAMES), first)
    assert cm.recompiles == 2


def test_what_no_graph_reads_changes_nothing(case: Case) -> None:
    cm = compiled(case)
    first = cm(X, adapter_names=NAMES)
    cm._orig_mod.unread = cm._orig_mod.norm.unread = 3
    cm._orig_mod.norm.epsilon = 1.0
    cm._orig_mod.norm.epsilon = 0.5
    compiled(case)  # which adds to tables that all models share
    torch.testing.assert_close(cm(X, adapter_names=NAMES), first)
    cm(X, adapter_names=["b", "b", "a"])
    assert cm.recompiles == 1


@pytest.mark.slow
def test_a_number_that_each_call_changes(tmp_path) -> None:
    """It takes as many graphs as with all of Dynamo's guards, which make it a size."""
    case = case_of(Counting(), tmp_path)
    cm, plain = compiled(case), compiled(case, [])
    for _ in range(4):
        got, want = (served(X, adapter_names=NAMES) for served in (cm, plain))
        torch.testing.assert_close(got, want)
    assert cm.recompiles == plain.recompiles


def test_memory_is_freed(case: Case) -> None:
    cm = compiled(case)
    model = weakref.ref(lorafx.detach(cm))
    del cm
    torch._dynamo.reset()
    gc.collect()
    assert model() is None


@pytest.mark.skipif(not saves_graphs(), reason="this torch saves no graphs")
def test_a_graph_from_a_folder(case: Case, tmp_path) -> None:
    def served() -> Any:
        options = {"lowering": "inductor", "cache": str(tmp_path / "graphs"), "start": "compiled"}
        cm = lorafx.compile(case.model(), case.folders, options=options)
        torch.testing.assert_close(cm(X, adapter_names=NAMES)[1:2], case.base(X[1:2]))
        return cm

    served()
    torch._dynamo.reset()
    cm, base = served(), case.model()
    assert [record.saved for record in cm._session.records] == ["loaded from the folder"]
    assert watched(cm) > 40
    for model in (cm._orig_mod, base):
        model.norm.epsilon = -2.0
    torch.testing.assert_close(cm(X, adapter_names=NAMES)[1:2], base(X[1:2]))
    assert cm.recompiles == 2
