"""`why`: each answer against what the model, the file or the merged model say themselves; and the
two faults of docs/look_inside.md, found by these tools alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from dense_merge import REFERENCE, Case, check_mixed, error, save_adapter
from tiny_models import FAMILIES
from torch import Tensor, nn

import lorafx

#: Of each family an adapter, and the first module in the order of the forward that it changes.
FIRST = {
    "llama": ("a0", "model.layers.0.self_attn.q_proj"),
    "plain": ("a3", "embed"),
}


def outputs(model: nn.Module, path: str, inputs: dict[str, Tensor]) -> Tensor:
    """What the module returned."""
    found: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_hook(lambda m, x, y: found.append(y.clone()))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return torch.cat([each.flatten() for each in found])


@pytest.mark.parametrize("family", FIRST)
def test_what_became_of_a_site(family: str, looked: Any) -> None:
    found = looked(family)
    cm, (name, path) = found.cm, FIRST[family]
    path = path or cm.get_adapter(name).sites[0]
    names = ["a1", None, "a0", "a3"]
    cm(**found.inputs, adapter_names=names)  # transformers' registries may have grown since
    count = cm.recompiles
    told = cm.why(path, adapter=name, inputs=found.inputs)
    assert told.selected
    assert told.path == path
    assert told.cls == type(found.case.base.get_submodule(path)).__name__
    assert f"{told.cls} is registered itself" in told.rule
    assert name in told.adapters
    # Norms and the change of the output are those of the merged model.
    base, merged = found.case.base, found.case.alone(name)
    weights = [model.get_submodule(path).weight for model in (base, merged)]
    change = weights[1] - weights[0]
    assert told.adapter.norm == pytest.approx(float(change.norm()), rel=1e-4)
    relative = float(change.norm() / weights[0].norm())
    assert told.adapter.relative_norm == pytest.approx(relative, rel=1e-4)
    before, after = (outputs(model, path, found.inputs) for model in (base, merged))
    measured = float((after - before).norm() / before.norm())
    assert told.adapter.change == pytest.approx(measured, rel=1e-4)
    lora, plain = told.graphs[:2]
    assert all(path in node.sites for node in lora.nodes)
    assert lora.nodes
    assert (lora.lora, plain.lora) == (True, False)
    text = str(told)
    for part in (path, told.rule, "(relative norm)"):
        assert part in text, part
    assert json.loads(json.dumps(told.json()))["adapter"]["change"] == told.adapter.change
    # Nothing is left of the measuring.
    assert cm.recompiles == count
    want_logits = found.case.expected(["a1"], {k: v[:1] for k, v in found.inputs.items()})
    got = cm(**found.inputs, adapter_names=names)["logits"]
    assert error(got[:1], want_logits) <= oracle.TOLERANCE
    assert cm.recompiles == count


def test_inputs_that_are_given(looked: Any) -> None:
    found = looked("plain")
    inputs = FAMILIES["plain"].inputs(2, 6)
    told = found.cm.why("embed", "a3").adapter
    assert told.change is None
    assert any("inputs={...}" in note for note in told.notes)
    told = found.cm.why("embed", "a3", inputs=inputs).adapter
    before, after = (
        outputs(model, "embed", inputs) for model in (found.case.base, found.case.alone("a3"))
    )
    assert told.change == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
    with pytest.raises(TypeError):
        found.cm.why("embed", "a3", inputs={"no_such": inputs["ids"]})
    assert not any(
        hook.__qualname__.startswith("change_of")
        for module in found.cm._orig_mod.modules()
        for hook in module._forward_hooks.values()
        if hasattr(hook, "__qualname__")
    )


class Norm(nn.Module):
    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))
        self.same = head

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Odd(nn.Module):
    """A packed projection, a module under two paths, a linear of a class that nobody knows."""

    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.kernel.T

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.mine = nn.Linear(6, 8), nn.Linear(8, 6), Odd.Mine()
        self.norm = Norm(self.down)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.mine(self.down(torch.relu(self.up(x)))))


def rule(path: str, **config: Any) -> str:
    cm = lorafx.compile(Odd().eval(), lorafx.LoraConfig(**config), options=REFERENCE)
    told = cm.why(path)
    cm.detach()
    return ("" if told.selected else "not: ") + told.rule


def test_the_rules() -> None:
    assert rule("up", target_modules=["up"]).startswith("target_modules has 'up'; Linear is")
    assert rule("up", target_modules="u.").startswith("target_modules='u.' matches its path")
    assert rule("up").startswith("no target_modules are given, which means all linear layers")
    assert "'all-linear'" in rule("up", target_modules="all-linear")
    assert rule("down", target_modules=["up"]).startswith(
        "not: target_modules=['up'] does not name it; Linear is registered itself"
    )
    told = rule("down", target_modules="all-linear", exclude_modules=["down"])
    assert told.startswith("not: exclude_modules=['down'] names it")
    told = rule("norm", target_modules="all-linear")
    assert "no class of the MRO of Norm is registered" in told
    assert "Sites below it: up, down" in rule("")


# The two faults of the guide
def test_guide_an_adapter_that_does_nothing(looked: Any) -> None:
    """The answers of "idle" are those of the base. Why?"""
    cm = looked("llama").cm
    assert "without effect: idle (no effect, because B is zero)" in cm.explain().summary[1]
    assert "without effect: idle (no effect, because B is zero)" in repr(cm)  # known by now
    told = cm.why("model.layers.0.self_attn.q_proj", adapter="idle", inputs=looked("llama").inputs)
    assert "no effect, because B is zero" in told.adapter.notes
    assert (told.adapter.norm, told.adapter.change) == (0, 0)


def test_guide_a_module_that_was_not_matched(tmp_path: Path) -> None:
    """An adapter for `mine` cannot be loaded: its class computes x Wᵀ, and nobody said so."""

    class Plain(nn.Linear):
        """Stands for the class in which the adapter was trained."""

    class Known(Odd.Mine):
        pass

    torch.manual_seed(0)
    trained = nn.ModuleDict({"up": nn.Linear(6, 6), "mine": Plain(6, 6, bias=False)})

    class Model(nn.Module):
        def __init__(self, mine: nn.Module) -> None:
            super().__init__()
            self.up, self.mine = copy.deepcopy(trained["up"]), mine

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.mine(torch.relu(self.up(x)))}

    mine = Known()
    mine.kernel.data.copy_(trained["mine"].weight.data)
    base = Model(trained["mine"]).eval().requires_grad_(False)
    folder = save_adapter(base, tmp_path / "a", rank=2, targets=["up", "mine"], seed=1)
    model = Model(mine).eval().requires_grad_(False)

    cm = lorafx.compile(model, lorafx.LoraConfig("all-linear", max_rank=2), options=REFERENCE)
    with pytest.raises(lorafx.LorafxError, match="mine"):
        cm.load_adapter(folder, "a")
    told = cm.why("mine")
    assert not told.selected
    assert "its class is not known as one" in told.rule
    assert "lorafx.register(Known, ...) says so" in told.rule
    cm.detach()

    lorafx.register(Known, in_features=lambda _: 6, out_features=lambda _: 6, weight="kernel")
    cm = lorafx.compile(model, lorafx.LoraConfig("all-linear", max_rank=2), options=REFERENCE)
    cm.load_adapter(folder, "a")
    assert cm.why("mine", "a").selected
    check_mixed(cm, Case(base, {"a": folder}), ["a", None], {"x": torch.randn(2, 6)})
