"""Of an attached model's own forward Dynamo guards one mark; what the guards on the others told is
still told."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from attached import attached, check, check_base, compiled, fresh_dynamo, served  # noqa: F401
from dense_merge import TOLERANCE, Case, case_by_patterns, error, random_base
from tiny_models import Family
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lorafx
import lorafx.torch_internals.frames
from lorafx.errors import ReplacedModuleError

_PLACE = re.compile(r"_modules\['(\d)'\]\._modules\['(\w+)'\]\._forward_hooks\[")
NAMES = ["a", None, "b", "a"]


class Stack(nn.Module):
    """Three equal blocks, the linears of each packed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"left": nn.Linear(8, 8), "right": nn.Linear(8, 8)}) for _ in range(3)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = x + torch.tanh(layer["left"](x) * layer["right"](x))
        return {"logits": x}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Adapter a touches every layer, b the first one alone."""
    folder = tmp_path_factory.mktemp("guards")
    base = random_base(Family(Stack, ()))
    targets = {"a": r"layers\.\d\..*", "b": r"layers\.0\..*"}
    return case_by_patterns(base, folder, targets)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Of each frame whose guards were chosen, the places under hooks that stay guarded."""
    found: list[list[str]] = []
    keep = lorafx.torch_internals.frames.keep_frame_guards

    def noting(guards: Any) -> None:
        names = {lorafx.torch_internals.frames.source_text(guard) for guard in guards}
        found.append(sorted(name for name in names if "_forward_hooks[" in name))
        keep(guards)

    monkeypatch.setattr("lorafx.torch_compile.mark_guards.keep_frame_guards", noting)
    return found


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {"x": torch.randn(len(NAMES), 8)}


@torch.no_grad()
def check_inductor(call: Any, case: Case) -> None:
    """A model without marks, which the backend leaves to Inductor."""
    assert error(call(**inputs())["logits"], case.base(**inputs())["logits"]) <= TOLERANCE


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def test_one_mark_is_guarded(case: Case, kept: list[list[str]]) -> None:
    model = attached(case)
    call = compiled(model)
    check(call, model, case, NAMES, inputs())
    check_base(call, case, inputs())
    assert len(kept) == 2
    for names in kept:
        assert {place for name in names for place in _PLACE.findall(name)} == {("0", "left")}
    assert any(name.endswith(".runtime._key") for name in kept[0])
    before = graphs()
    for _ in range(2):
        check(call, model, case, NAMES, inputs())
        check_base(call, case, inputs())
        check(call, model, case, ["b", "b", "b", "b"], inputs())
    assert graphs() == before


def test_models_of_one_class(case: Case) -> None:
    """They run the same code, so one's graphs are asked for the other's calls too."""
    other_case = Case(case.base, {"a": case.folders["b"], "b": case.folders["a"]})
    first, other = attached(case), attached(other_case)
    calls = compiled(first), compiled(other)
    for _ in range(2):
        check(calls[0], first, case, NAMES, inputs())
        check(calls[1], other, other_case, NAMES, inputs())
        for call in calls:
            check_base(call, case, inputs())


def test_a_mark_that_is_taken_away(case: Case) -> None:
    """`match` finds the weight without its mark, so the graph is the same."""
    model = attached(case)
    call = compiled(model)
    check(call, model, case, NAMES, inputs())
    before = graphs()
    model.layers[2]["right"]._forward_hooks.clear()
    check(call, model, case, NAMES, inputs())
    assert graphs() == before
    model.layers[0]["left"]._forward_hooks.clear()
    check(call, model, case, NAMES, inputs())
    assert graphs() == before + 1
    lorafx.detach(model)
    check_inductor(call, case)


def test_layers_that_change_places_unseen(case: Case) -> None:
    """torch reports no writes to `_modules`."""
    model = attached(case)
    call = compiled(model)
    check(call, model, case, NAMES, inputs())
    held = model.layers._modules
    held["1"], held["2"] = held["2"], held["1"]
    with pytest.raises(ReplacedModuleError, match=r"layers\.1, a ModuleDict, was replaced"):
        served(call, model, NAMES, inputs())
    held["1"], held["2"] = held["2"], held["1"]
    check(call, model, case, NAMES, inputs())
    held["1"] = copy.deepcopy(held["1"])
    with pytest.raises(ReplacedModuleError, match=r"layers\.1, a ModuleDict, was replaced"):
        served(call, model, NAMES, inputs())


def test_layers_by_themselves_keep_all_guards(case: Case, kept: list[list[str]]) -> None:
    """Where `self` is a layer, guards on marks tell layers apart."""
    model = attached(case)
    for layer in model.layers:
        for linear in layer.values():
            linear.compile(backend="lorafx", dynamic=True)
    for _ in range(2):
        check(model, model, case, ["a"] * 4, inputs())
    assert kept == []


def test_hooks_elsewhere_capture_nothing(case: Case) -> None:
    """torch numbers all hooks of a process one after another."""
    model = attached(case)
    call = compiled(model)
    check(call, model, case, NAMES, inputs())
    before = graphs()
    for _ in range(2):
        nn.Linear(2, 2).register_forward_hook(lambda *_: None)
        check(call, model, case, NAMES, inputs())
    assert graphs() == before


@pytest.mark.parametrize("before", [False, True])
def test_hooks_in_front_of_modules_are_noticed(case: Case, before: bool) -> None:
    """Beside a mark; and where one was there already, one more."""
    model = attached(case)
    call = compiled(model)
    linear = model.layers[1]["left"]

    def halve(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0] / 2,)

    handles = [linear.register_forward_pre_hook(halve)] if before else []
    first = served(call, model, NAMES, inputs())
    handles.append(linear.register_forward_pre_hook(halve))
    hooked = served(call, model, NAMES, inputs())
    torch._dynamo.reset()
    anew = served(call, model, NAMES, inputs())
    for handle in handles:
        handle.remove()
    assert error(hooked, anew) <= TOLERANCE < error(hooked, first)


@pytest.mark.parametrize("everywhere", [False, True])
def test_hooks_that_users_add_are_noticed(case: Case, everywhere: bool) -> None:
    """Of what torch.nn notes of a mark beside it Dynamo guards next to nothing."""
    model = attached(case)
    call = compiled(model)
    before = served(call, model, NAMES, inputs())
    linear = model.layers[2]["right"]

    def halve(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return output / 2 if module is linear else None

    register = nn.modules.module.register_module_forward_hook
    handle = (register if everywhere else linear.register_forward_hook)(halve, always_call=True)
    try:
        hooked = served(call, model, NAMES, inputs())
        torch._dynamo.reset()
        anew = served(call, model, NAMES, inputs())
    finally:
        handle.remove()
    assert error(hooked, anew) <= TOLERANCE < error(hooked, before)
    check(call, model, case, NAMES, inputs())
