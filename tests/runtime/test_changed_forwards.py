"""Forwards that are put in the place of the model's own once it is served, as wrappers do that
patch a model, its class or that of a layer. Calls went on with the one that was there at first."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from dense_merge import Case, case_by_targets, check_mixed, error
from slowly import few
from tiny_models import plain_inputs, token_inputs
from torch import nn

NAMES = ["a0", None, "a1"]


def tripled(original: Any) -> Any:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        output["logits"] = output["logits"] * -3
        return output

    return forward


def test_of_the_model_or_of_its_class(plain: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    cm, inputs = plain.compile(), plain_inputs(3, 4)
    want, base = plain.expected(NAMES, inputs) * -3, plain.expected([None] * 3, inputs) * -3
    check_mixed(cm, plain, NAMES, inputs)
    cls = type(cm._orig_mod)
    patched = tripled(cls.forward)

    def check_patched() -> None:
        for _ in range(2):
            assert error(cm(**inputs, adapter_names=NAMES)["logits"], want) <= 1e-5
            assert error(cm(**inputs)["logits"], base) <= 1e-5

    cm._orig_mod.forward = MethodType(patched, cm._orig_mod)
    check_patched()
    captured = cm.recompiles
    check_patched()
    assert cm.recompiles == captured
    del cm._orig_mod.forward
    check_mixed(cm, plain, NAMES, inputs)
    with monkeypatch.context() as patch:
        patch.setattr(cls, "forward", patched)
        check_patched()
    check_mixed(cm, plain, NAMES, inputs)


@pytest.mark.parametrize("start", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_of_a_model_that_generates(llama: Case, start: str) -> None:
    cm, inputs = llama.compile({"start": start, "cache": None}), token_inputs(2, 5)
    short = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    before = cm.generate(**inputs, **short, adapter_names=["a1", None])
    models = {"a1": llama.alone("a1"), None: llama.base}
    forward = tripled(type(cm._orig_mod).forward)
    try:
        for model in (cm._orig_mod, *models.values()):
            model.forward = MethodType(forward, model)
        got = cm.generate(**inputs, **short, adapter_names=["a1", None])
        for row, model in enumerate(models.values()):
            one = {name: value[row : row + 1] for name, value in inputs.items()}
            assert torch.equal(got[row : row + 1], model.generate(**one, **short))
        assert not torch.equal(got, before)
        assert "forward" in vars(cm._orig_mod)
    finally:
        for model in models.values():
            del model.forward


class Layer(nn.Linear):
    """A site whose forward is inherited, with a method of its own beside it."""

    def scale(self) -> float:
        return 0.5


class Layered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = Layer(8, 12), nn.Tanh(), Layer(12, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.down(self.act(self.up(x)) * self.up.scale())}


@pytest.mark.parametrize("start", few(["compiled", "eager"], "eager"))
@pytest.mark.parametrize(
    ("cls", "name", "replaced"),
    [
        (Layer, "scale", lambda _: 2.0),
        (Layer, "forward", lambda self, x: torch.nn.functional.linear(x, self.weight)),
        (nn.Tanh, "forward", lambda _, x: x.sigmoid()),
    ],
)
def test_of_the_class_of_a_layer(
    compiled_beside, cls, name, replaced, start, tmp_path, monkeypatch
) -> None:
    torch.manual_seed(0)
    case = case_by_targets(Layered().eval(), tmp_path, {"a": r"up|down", "b": r"up"})
    cm, inputs = case.compile({"start": start}), {"x": torch.randn(3, 8)}

    def check() -> None:
        for _ in range(2):
            check_mixed(cm, case, ["a", None, "b"], inputs)
        cm.wait()
        check_mixed(cm, case, ["a", None, "b"], inputs)

    check()
    before, captured = case.expected(["a", None, "b"], inputs), cm.recompiles
    with monkeypatch.context() as patch:
        patch.setattr(cls, name, replaced, raising=False)
        assert error(case.expected(["a", None, "b"], inputs), before) > 1e-2
        check()
        assert cm.recompiles > captured == 1
        captured = cm.recompiles
    check()
    assert cm.recompiles == captured
