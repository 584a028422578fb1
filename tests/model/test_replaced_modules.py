"""Modules that are replaced, moved or taken out after lorafx was given the model.

What carries LoRA must be there or its adapters are refused by name; everything else may change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dense_merge
import pytest
import torch
from attached import EAGER, compiled, fresh_dynamo, served  # noqa: F401  (the fixture)
from dense_merge import REFERENCE, TOLERANCE, Case, case_by_targets, error, random_base
from slowly import few
from tiny_models import Family, token_inputs
from torch import Tensor, nn

import lorafx
from lorafx.errors import ReplacedModuleError

NAMES = ["a", None, "b", "a"]


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))


class Stack(nn.Module):
    """Residual blocks, a module that no adapter touches, and a head whose call is never made."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(3))
        self.side = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = x + layer(x)
        x = self.side(x)
        for name in ("extra", "more"):
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return {"logits": nn.functional.linear(x, self.head.weight, self.head.bias)}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Adapter a touches every layer and the head, b the middle layer alone."""
    targets = {"a": r"layers\.\d\.[02]|head", "b": r"layers\.1\.[02]"}
    base = random_base(Family(Stack, ()))
    return case_by_targets(base, tmp_path_factory.mktemp("replaced"), targets)


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {"x": torch.randn(len(NAMES), 8)}


def check(cm: nn.Module, case: Case, names: list[str | None] = NAMES) -> None:
    got = cm(**inputs(), adapter_names=names)["logits"]
    assert error(got, case.expected(names, inputs())) <= TOLERANCE


def frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


def by_setattr(model: Stack) -> None:
    setattr(model.layers[0], "0", frozen(nn.Linear(8, 12)))


def the_head(model: Stack) -> None:
    model.head = frozen(nn.Linear(8, 5))


def popped(model: Stack) -> None:
    model.layers.pop(0)


def swapped(model: Stack) -> None:
    held = model.layers._modules
    held["0"], held["1"] = held["1"], held["0"]


CHANGES = [by_setattr, the_head, popped, swapped]


@pytest.mark.parametrize("change", few(CHANGES, by_setattr, swapped))
def test_what_is_replaced_is_refused_until_it_is_back(
    case: Case, change: Callable[[Stack], None]
) -> None:
    cm = case.compile()
    model = cm._orig_mod
    check(cm, case)
    kept = [(module, dict(module._modules)) for module in model.modules()]
    change(model)
    with torch.no_grad():
        changed = model(**inputs())["logits"]
    for _ in range(2):
        with pytest.raises(ReplacedModuleError, match=r"(layers|head).* was (replaced|taken out)"):
            cm(**inputs(), adapter_names=NAMES)
    with pytest.raises(ReplacedModuleError):
        cm.merge("a")
    with pytest.raises(ReplacedModuleError):
        cm.load_weights(model.state_dict())
    with pytest.raises(ReplacedModuleError):
        cm.load_adapter(case.folders["a"], "again")
    assert cm.merged is None
    assert cm.adapters == ("a", "b")
    assert "replaced after" in str(cm.explain())
    # The base is the model as it is now.
    assert error(cm(**inputs())["logits"], changed) <= TOLERANCE
    for module, held in kept:
        module._modules.clear()
        module._modules.update(held)
    check(cm, case)
    assert "replaced after" not in str(cm.explain())
    change(model)
    with pytest.raises(ReplacedModuleError):
        cm(**inputs(), adapter_names=NAMES)


@pytest.mark.parametrize("start", ["eager", "compiled"])
def test_a_weight_of_other_sizes_is_refused_until_it_is_back(case: Case, start: str) -> None:
    cm = case.compile({"start": start})
    head = cm._orig_mod.head
    kept = dict(head._parameters)
    head.weight, head.bias = frozen(nn.Linear(8, 7)).parameters()
    with pytest.raises(lorafx.MatchError, match=r"head.*7"):
        cm(**inputs(), adapter_names=NAMES)
    head._parameters.update(kept)
    check(cm, case)


def test_the_first_hook_may_return_anything(case: Case) -> None:
    cm = case.compile({"start": "compiled"})
    layer = cm._orig_mod.layers[0][0]
    layer.register_forward_hook(lambda _module, _args, y: {"y": y}, prepend=True)
    layer.register_forward_hook(lambda _module, _args, y: y["y"])
    check(cm, case)


def test_a_class_that_is_set_later_may_return_anything(case: Case) -> None:
    class Listed(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return [super().forward(x)]

    cm = case.compile({"start": "compiled"})
    layer = cm._orig_mod.layers[0][0]
    layer.__class__ = Listed
    layer.register_forward_hook(lambda _module, _args, y: y[0])
    check(cm, case)


def test_adapters_that_touch_other_modules_are_served(case: Case) -> None:
    cm = case.compile()
    check(cm, case)
    changed = case.model()
    replacement = frozen(nn.Linear(8, 5))
    cm._orig_mod.head = replacement
    changed.head = copy.deepcopy(replacement)
    other = Case(changed, {"b": case.folders["b"]})
    check(cm, other, ["b", None, None, "b"])
    cm.load_adapter(case.folders["b"], "c")
    with pytest.raises(ReplacedModuleError, match="head, a"):
        cm(**inputs(), adapter_names=NAMES)
    check(cm, other, [None, "b", None, "b"])


def test_other_modules_may_come_and_change(case: Case) -> None:
    """Their weights are known as weights, and `load_weights` writes to what is there."""
    cm, changed = case.compile(), case.model()
    check(cm, case)
    for model in (cm._orig_mod, changed):
        torch.manual_seed(7)
        model.side = frozen(nn.Linear(8, 8))
        model.extra = frozen(nn.Linear(8, 8))
        model._modules["more"] = frozen(nn.Linear(8, 8))
        model.layers.append(frozen(block()))
    other = Case(changed, case.folders)
    check(cm, other)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.1)
    cm.load_weights({name: tensor.clone() for name, tensor in changed.state_dict().items()})
    other.merged.clear()
    check(cm, other)
    cm.merge("a")
    check(cm, other, ["a"] * 4)
    cm.unmerge()
    check(cm, other)


def test_resized_embeddings(tmp_path: Path) -> None:
    base = random_base("llama", tie_word_embeddings=False)
    folders = {
        "head": dense_merge.save_adapter(
            base, tmp_path / "head", rank=2, targets=["lm_head", "q_proj"]
        ),
        "layers": dense_merge.save_adapter(
            base, tmp_path / "layers", rank=3, targets=["q_proj"], seed=1
        ),
    }
    case, batch = Case(base, folders), token_inputs(2, 5)
    cm = case.compile()
    cm(**batch, adapter_names=["head", None])
    torch.manual_seed(0)
    cm._orig_mod.resize_token_embeddings(136)
    with pytest.raises(ReplacedModuleError, match=r"lm_head, a Linear \(\d+ -> 61\).*136\)"):
        cm(**batch, adapter_names=["head", None])
    resized = Case(copy.deepcopy(cm._orig_mod), folders)
    lorafx.detach(resized.base)
    names = ["layers", None]
    got = cm(**batch, adapter_names=names)["logits"]
    assert error(got, resized.expected(names, batch)) <= TOLERANCE


@pytest.mark.parametrize("change", [by_setattr, popped])
def test_attached_models(case: Case, change: Callable[[Stack], None]) -> None:
    model = lorafx.attach(case.model(), case.folders, options=REFERENCE)
    call = compiled(model, dynamic=False)
    want = case.expected(NAMES, inputs())
    assert error(served(call, model, NAMES, inputs()), want) <= TOLERANCE
    kept = [(module, dict(module._modules)) for module in model.modules()]
    change(model)
    for _ in range(2):
        with pytest.raises(ReplacedModuleError, match=r"layers|head"):
            served(call, model, NAMES, inputs())
    for module, held in kept:
        module._modules.clear()
        module._modules.update(held)
    assert error(served(call, model, NAMES, inputs()), want) <= TOLERANCE


def test_graphs_of_the_base_do_not_outlive_what_was_replaced(case: Case) -> None:
    """Where all marks are gone, there is no guard of Dynamo's to tell when they are back."""
    model = lorafx.attach(case.model(), case.folders, options=REFERENCE)
    call = compiled(model, dynamic=False)
    kept = model.layers
    model.layers = nn.ModuleList(frozen(block()) for _ in range(3))
    with torch.no_grad():
        want = model(**inputs())["logits"]
        assert error(call(**inputs())["logits"], want) <= TOLERANCE
    model.layers = kept
    got = served(call, model, NAMES, inputs())
    assert error(got, case.expected(NAMES, inputs())) <= TOLERANCE


def test_attached_models_in_eager_mode(case: Case) -> None:
    model = lorafx.attach(case.model(), case.folders)
    old = model.layers[0]
    model.layers[0] = frozen(block())
    with pytest.raises(ReplacedModuleError, match="layers"), EAGER():
        served(model, model, "a", inputs())
    with pytest.raises(ReplacedModuleError, match="layers"):
        lorafx.load_adapter(model, case.folders["a"], "again")
    model.layers[0] = old
    # The head's delta has no place in eager mode, and b does not touch it.
    with EAGER():
        got = served(model, model, "b", inputs())
    assert error(got, case.expected(["b"] * 4, inputs())) <= TOLERANCE


def test_no_call_walks_the_model(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in ordinary calls nor where modules of no model of lorafx's are made."""
    cm = case.compile()
    check(cm, case)
    looks = []
    watch = cm._session.program.site_watch
    monkeypatch.setattr(watch, "look", lambda: looks.append(1))
    check(cm, case)
    Stack()
    check(cm, case)
    assert not looks
