"""`torch.compile(model, backend="lorafx", options={"lora_config": ...})`, the model not marked."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attached import check, check_base, fresh_dynamo, graphs, served
from dense_merge import REFERENCE, Case, error
from tiny_models import FAMILIES, token_inputs
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import lorafx
from lorafx.errors import (
    CaptureError,
    ConfigError,
    ProvenanceError,
    TargetError,
    UnknownAdapterError,
)
from lorafx.torch_compile.attached import session_of

__all__ = ["fresh_dynamo"]
feed = FAMILIES["plain"].inputs
NAMES = ["a", None, "b"]


def compiled(model: Any, case: Case, *, dynamic: bool = False, **options: Any) -> Any:
    wanted = {"adapters": case.folders, **REFERENCE, **options}
    return torch.compile(model, backend="lorafx", dynamic=dynamic, options=wanted)


class Marked(nn.Module):
    """The mark of `w` stands in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.w = nn.Linear(6, 9)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.w(torch.tanh(self.first(x)))}


class Bypass(Marked):
    """No mark in the graph, and nothing for Dynamo to tell models of this class apart by."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": F.linear(torch.tanh(self.first(x)), self.w.weight, self.w.bias)}


class Broken(Marked):
    """Two graphs, the first without LoRA."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.first(x))
        torch._dynamo.graph_break()
        return {"logits": self.w(h)}


def twin_of(case: Case) -> Case:
    """The same class and adapters with other weights."""
    base = case.model()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(-0.7)
    return Case(base, case.folders)


@pytest.mark.parametrize("cls", [Marked, Bypass, Broken])
@pytest.mark.parametrize("base_first", [True, False])
def test_two_models_of_one_class(small, cls, base_first):
    """Dynamo may serve the second by graphs of the first: nothing of either is baked in."""
    torch.manual_seed(0)
    first = small(cls, ["w"])
    second, inputs = twin_of(first), {"x": torch.randn(3, 4, 6)}
    models = [first.model(), second.model()]
    calls = [compiled(model, first, dynamic=True) for model in models]
    if base_first:
        for call, case in zip(calls, (first, second), strict=True):
            check_base(call, case, inputs)
    for names in (NAMES, ["b", None, "b"], ["a", "a", "a"]):
        for call, model, case in zip(calls, models, (first, second), strict=True):
            check(call, model, case, names, inputs)
            check(call, call, case, names[::-1], inputs)
    for call, case in zip(calls, (first, second), strict=True):
        check_base(call, case, inputs)
    wrong = first.expected(NAMES, inputs)
    assert error(served(calls[1], models[1], NAMES, inputs), wrong) > 0.1
    captured = [graphs(model) for model in models]
    for call, model, case in zip(calls, models, (first, second), strict=True):
        check(call, model, case, [None, "b", "a", "b"], {"x": torch.randn(4, 2, 6)})
    assert [graphs(model) for model in models] == captured


@pytest.mark.parametrize("way", ["forward", "module.compile"])
def test_what_torch_compile_left_on_the_model_stays_there(small, way):
    """`generate` needs `model.forward` compiled; Module.compile keeps its call on the module."""
    torch.manual_seed(0)
    case, inputs = small(Marked, ["w"]), {"x": torch.randn(3, 4, 6)}
    model = case.model()
    wanted = {"adapters": case.folders, **REFERENCE}
    if way == "forward":
        model.forward = torch.compile(
            model.forward, backend="lorafx", dynamic=False, options=wanted
        )
    else:
        model.compile(backend="lorafx", dynamic=False, options=wanted)
    left = vars(model).get("forward"), model._compiled_call_impl
    check_base(model, case, inputs)
    check(model, model, case, NAMES, inputs)
    captured = graphs(model)
    check(model, model, case, NAMES[::-1], inputs)
    assert graphs(model) == captured
    assert (vars(model).get("forward"), model._compiled_call_impl) == left


@pytest.mark.quick
@pytest.mark.parametrize("cls", [Marked, Bypass])
def test_two_models_with_other_adapters_under_one_name(small, cls):
    torch.manual_seed(0)
    case, inputs = small(cls, ["w"]), {"x": torch.randn(3, 4, 6)}
    swapped = Case(case.base, {"a": case.folders["b"], "b": case.folders["a"]})
    for order in ((case, swapped), (swapped, case)):
        torch._dynamo.reset()
        models = [item.model() for item in order]
        calls = [compiled(model, item) for model, item in zip(models, order, strict=True)]
        for _ in range(2):
            for call, model, item in zip(calls, models, order, strict=True):
                check(call, model, item, NAMES, inputs)


def test_a_transformers_model(shallow):
    torch.manual_seed(0)
    model = shallow.model()
    call = torch.compile(
        model,
        backend="lorafx",
        fullgraph=True,
        dynamic=True,
        options={"lora_config": None, "adapters": shallow.folders, **REFERENCE},
    )
    names = ["a0", "a3", None]
    with torch.inference_mode(), lorafx.adapters(model, names):
        got = call(**token_inputs(3, 5)).logits
    assert got.shape == (3, 5, 61)
    check(call, model, shallow, names, token_inputs(3, 6))
    check(call, model, shallow, ["a4", "a1"], token_inputs(2, 3))
    assert graphs(model) == 2  # one in inference mode
    lorafx.load_adapter(model, shallow.folders["a2"], "a4")
    ids = torch.randint(3, 61, (2, 3))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    got = served(call, model, ["a4", None], inputs)
    assert error(got, shallow.expected(["a2", None], inputs)) <= 1e-5


@pytest.mark.quick
def test_what_is_refused_and_leaves_the_model_as_it_was(plain):
    model, inputs = plain.model(), feed(2, 4)
    call = compiled(model, plain)
    with pytest.raises(UnknownAdapterError, match="no adapter named 'zz'"):
        served(call, model, ["a0", "zz"], inputs)
    assert session_of(model) is None
    with pytest.raises(ConfigError, match="no call inside the block has given"):
        served(model, model, ["a0", None], inputs)
    with pytest.raises(ValueError, match="of the caller"), lorafx.adapters(model, "a0"):
        raise ValueError("of the caller")
    for options, error_class, message in (
        ({"lora_config": {"target_modules": ["no_such"], "r": 2}}, TargetError, "no_such"),
        ({"adaptrs": {}}, ConfigError, "unknown option 'adaptrs'; nearest: adapters"),
        ({"lowering": "inducto"}, ConfigError, "lowering"),
    ):
        other = compiled(model, plain, **options)
        with pytest.raises((error_class, BackendCompilerFailed), match=message), torch.no_grad():
            other(**inputs)
        with pytest.raises(error_class, match=message):
            served(other, model, ["a0", None], inputs)
        assert session_of(model) is None
        assert not any(module._forward_hooks for module in model.modules())
    check(call, model, plain, ["a0", None], inputs)
    with pytest.raises(ConfigError, match="carries LoRA already"):
        compiled(model, plain, lora_config=lorafx.LoraConfig(target_modules=["up"]))(**inputs)


def test_compiled_functions(plain):
    """Uniform batches are right; whose rows a function's arguments are is not known."""
    torch.manual_seed(0)
    model, inputs = plain.model(), feed(2, 4)
    by_forward = compiled(model.forward, plain)
    check(by_forward, model, plain, ["a0", "a0"], inputs)
    other = plain.model()
    by_function = compiled(lambda ids: {"logits": other(ids)["logits"] + 0}, plain)
    served(lambda **given: by_function(given["ids"]), other, ["a1", "a1"], inputs)
    with pytest.raises(ProvenanceError, match="no input of this graph is known to hold"):
        served(lambda **given: by_function(given["ids"]), other, ["a1", None], inputs)
    with pytest.raises(BackendCompilerFailed, match="do not say which model they are for"):
        _function_of_two(plain)(inputs["ids"])
    with pytest.raises(CaptureError, match="one graph holds several models"):
        _two_models(plain, inputs)


def _function_of_two(plain: Case) -> Any:
    one, two = plain.model(), plain.model()
    return compiled(lambda ids: one(ids)["logits"] + two(ids)["logits"], plain)


def _two_models(plain: Case, inputs: dict[str, Tensor]) -> None:
    torch._dynamo.reset()
    models = [lorafx.attach(plain.model(), plain.folders, options=REFERENCE) for _ in range(2)]

    def both(**arguments: Tensor) -> dict[str, Tensor]:
        return {"logits": models[0](**arguments)["logits"] + models[1](**arguments)["logits"]}

    served(torch.compile(both, backend="lorafx"), models[0], ["a0", "a0"], inputs)


def test_a_model_without_lora_is_logged_once(caplog):
    """Somebody who forgot the options would otherwise serve the base model and not know why."""
    caplog.set_level(logging.WARNING, "lorafx")
    net, x = nn.Sequential(nn.Linear(6, 9)), torch.randn(2, 6)
    for rows in (2, 3):
        torch.compile(net, backend="lorafx", options=REFERENCE, dynamic=False)(torch.randn(rows, 6))
    [record] = [record for record in caplog.records if record.name == "lorafx"]
    assert "of Sequential: it carries no LoRA" in record.getMessage()
    caplog.clear()
    marked, asked = Marked().eval(), Broken().eval()
    lorafx.attach(marked, lorafx.LoraConfig(target_modules=["w"]), options=REFERENCE)
    compile_it = torch.compile(marked, backend="lorafx")
    compile_it(x)
    options = {"lora_config": lorafx.LoraConfig(target_modules=["w"]), **REFERENCE}
    torch.compile(asked, backend="lorafx", options=options)(x)
    assert not [record for record in caplog.records if record.name == "lorafx"]


def test_first_calls_on_two_threads(small):
    """The second thread's block begins before the model is marked, as far as it knows."""
    case = small(Broken, ["first", "w"])
    model, x = compiled(case.model(), case), torch.randn(3, 5, 6)
    answers: dict[str, Tensor] = {}

    def serve(name: str) -> None:
        with torch.no_grad(), lorafx.adapters(model, name):
            answers[name] = model(x)["logits"]

    threads = [threading.Thread(target=serve, args=(name,), daemon=True) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for name in "ab":
        assert error(answers[name], case.expected([name] * 3, {"x": x})) <= 1e-5
