"""`torch.compile(backend="lorafx")`: models without LoRA, models that its options give some, and
those of PEFT."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from attached import attached, check, check_base, compiled, fresh_dynamo, graphs, served  # noqa: F401  (the fixture)
from dense_merge import REFERENCE, TOLERANCE, Case, error, random_base, save_adapter
from peft import PeftModel
from tiny_models import FAMILIES, PlainModel, token_inputs
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from waiting import LONG

import lorafx
from lorafx.compiled_model.compiled import compiled_of
from lorafx.errors import CaptureError, ConfigError, TargetError, UnknownAdapterError

feed = FAMILIES["plain"].inputs


# --- models without LoRA ---
def inference_and_gradients(backend: str, inputs: dict[str, Tensor], **kwargs: Any) -> list[Tensor]:
    """Logits without and with gradients wanted, and the gradients of all parameters."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = PlainModel().eval()
    call = torch.compile(model, backend=backend, **kwargs)
    with torch.no_grad():
        alone = call(**inputs)["logits"]
    wanted = call(**inputs)["logits"]
    wanted.square().mean().backward()
    return [alone, wanted.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("dynamic", [pytest.param(None, marks=pytest.mark.slow), True])
def test_without_lora_it_is_inductor_bit_for_bit(dynamic: bool | None) -> None:
    inputs = feed(4, 6)
    want = inference_and_gradients("inductor", inputs, dynamic=dynamic)
    got = inference_and_gradients("lorafx", inputs, dynamic=dynamic)
    assert len(got) == len(want) == 10
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "mode",
    # That a mode is handed on, the last one shows.
    [
        *(pytest.param(mode, marks=pytest.mark.slow) for mode in (None, "reduce-overhead")),
        "max-autotune-no-cudagraphs",
    ],
)
def test_a_mode_holds_for_the_base_and_that_of_attach_for_adapters(
    plain: Case, mode: str | None
) -> None:
    torch.manual_seed(0)
    model, inputs = lorafx.attach(plain.model(), plain.folders, options={"mode": mode}), feed(3, 4)
    call, own = (
        torch.compile(m, backend=b, mode=mode)
        for m, b in ((model, "lorafx"), (plain.model(), "inductor"))
    )
    with torch.no_grad():
        assert torch.equal(call(**inputs)["logits"], own(**inputs)["logits"])
    check(call, model, plain, ["a0", None, "a1"], inputs)


def test_modes_and_options_that_are_none(plain: Case) -> None:
    with pytest.raises(BackendCompilerFailed, match="Unrecognized mode=fastest"):
        torch.compile(plain.model(), backend="lorafx", mode="fastest")(**feed(1, 2))
    for options, message in (
        ({"max_autotune": True}, "unknown option 'max_autotune'"),
        ({"lowring": "reference"}, "unknown option 'lowring'; nearest: lowering"),
        ({"passes": {"pak": False}}, "unknown pass 'pak'; nearest: pack"),
    ):
        with pytest.raises(ConfigError, match=message):
            compiled(plain.model(), options=options)(**feed(1, 2))


PROCESS = """
import sys, torch
model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh()).eval()
x = torch.randn(4, 6)
assert "lorafx" not in sys.modules
assert "lorafx" in torch._dynamo.list_backends()
with torch.no_grad():
    got = torch.compile(model, backend="lorafx")(x)
    assert torch.equal(got, torch.compile(model)(x))
import lorafx
from lorafx.integrations.torch_compile.dynamo_backend import compile_frame
assert torch._dynamo.lookup_backend("lorafx") is compile_frame
assert "peft" not in sys.modules and "transformers" not in sys.modules
print("found")
"""


@pytest.mark.slow
def test_found_by_its_entry_point_without_an_import() -> None:
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROCESS], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "found\n"


# --- LoRA by options ---
def asking(model: Any, case: Case, **options: Any) -> Any:
    return compiled(model, options={"adapters": case.folders, **REFERENCE, **options})


class Broken(nn.Module):
    """Two graphs, the first without LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.w = nn.Linear(6, 9)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.first(x))
        torch._dynamo.graph_break()
        return {"logits": self.w(h)}


@pytest.mark.parametrize("first", ["base", "block"])
@pytest.mark.parametrize(
    "family", ["plain", pytest.param("llama", marks=pytest.mark.slow), "broken"]
)
def test_the_first_call(request: Any, small: Callable[..., Case], family: str, first: str) -> None:
    torch.manual_seed(0)
    case = small(Broken, ["w"]) if family == "broken" else request.getfixturevalue(family)
    inputs = {
        "plain": lambda: feed(3, 5),
        "llama": lambda: token_inputs(3, 5),
        "broken": lambda: {"x": torch.randn(3, 4, 6)},
    }[family]()
    a, b = list(case.folders)[:2]
    model = case.model()
    call = asking(model, case)
    if first == "base":
        check_base(call, case, inputs)
        assert compiled_of(model) is not None
    check(call, model, case, [a, None, b], inputs)
    captured = graphs(model)
    check(call, call, case, [b, a, b], inputs)
    check_base(call, case, inputs)
    assert graphs(model) == captured


def test_what_is_refused_leaves_the_model_as_it_was(plain: Case) -> None:
    model, inputs = plain.model(), feed(2, 4)
    call = asking(model, plain)
    with pytest.raises(ConfigError, match="no call inside the block has given"):
        served(model, model, ["a0", None], inputs)
    with pytest.raises(ValueError, match="of the caller"), lorafx.adapters(model, "a0"):
        raise ValueError("of the caller")
    for options, kind, message in (
        ({"lora_config": {"target_modules": ["no_such"], "r": 2}}, TargetError, "no_such"),
        ({"adaptrs": {}}, ConfigError, "unknown option 'adaptrs'; nearest: adapters"),
        ({"lowering": "inducto"}, ConfigError, "lowering"),
    ):
        other = asking(model, plain, **options)
        with pytest.raises((kind, BackendCompilerFailed), match=message), torch.no_grad():
            other(**inputs)
        with pytest.raises(kind, match=message):
            served(other, model, ["a0", None], inputs)
        assert compiled_of(model) is None
        assert "forward" not in vars(model)
        assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(UnknownAdapterError, match="no adapter named 'zz'"):
        served(call, model, ["a0", "zz"], inputs)
    check(call, model, plain, ["a0", None], inputs)


def test_what_is_compiled_beside_a_model(plain: Case) -> None:
    """Of a function it is not known which model its options are for; `Module.compile` stays."""
    model, inputs = plain.model(), feed(2, 4)
    for function in (model.forward, lambda **given: model(**given)):
        with pytest.raises(BackendCompilerFailed, match=r"call lorafx\.attach"):
            asking(function, plain)(**inputs)
    model.compile(backend="lorafx", dynamic=True, options={"adapters": plain.folders, **REFERENCE})
    left = model._compiled_call_impl
    check_base(model, plain, inputs)
    check(model, model, plain, ["a0", None], inputs)
    assert model._compiled_call_impl is left


@pytest.mark.parametrize("first", ["base", "block"])
def test_the_forward_may_be_compiled_in_its_place(plain: Case, first: str) -> None:
    model, inputs = plain.model(), feed(2, 4)
    model.forward = forward = asking(model.forward, plain)
    if first == "base":
        check_base(model, plain, inputs)
    check(model, model, plain, ["a0", None], inputs)
    check_base(model, plain, inputs)
    assert lorafx.detach(model).forward is forward


def test_first_calls_on_two_threads(small: Callable[..., Case]) -> None:
    """The second thread's block begins before the model is marked, as far as it knows."""
    case = small(Broken, ["first", "w"])
    model, x = asking(case.model(), case), torch.randn(3, 5, 6)
    answers: dict[str, Tensor] = {}

    def serve(name: str) -> None:
        with torch.no_grad(), lorafx.adapters(model, name):
            answers[name] = model(x)["logits"]

    threads = [threading.Thread(target=serve, args=(name,), daemon=True) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    for name in "ab":
        assert error(answers[name], case.expected([name] * 3, {"x": x})) <= 1e-5


def test_a_graph_captured_before_attaching_is_no_silent_no_op(plain: Case) -> None:
    model, inputs = plain.model(), feed(2, 4)
    call = compiled(lambda **given: model(**given), options=REFERENCE)
    check_base(call, plain, inputs)
    lorafx.attach(model, plain.folders, options=REFERENCE)
    with suppress(CaptureError):  # where Dynamo does not look for the model's new forward
        check(call, model, plain, ["a0", None], inputs)
    check_base(call, plain, inputs)
    torch._dynamo.reset()
    check(call, model, plain, ["a0", None], inputs)


def test_an_attached_model_keeps_its_own_options(plain: Case) -> None:
    model, inputs = attached(plain), feed(2, 4)
    check(asking(model, plain), model, plain, ["a0", None], inputs)
    check_base(asking(model, plain), plain, inputs)


@torch.no_grad()
def test_every_switch_of_peft_has_its_effect(tmp_path: Path) -> None:
    base = random_base("llama", num_hidden_layers=1)
    for index, name in enumerate("ab"):
        targets = ["q_proj", "o_proj", "down_proj"]
        save_adapter(base, tmp_path / name, rank=3 + index, seed=index, targets=targets)
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "a"), "a").eval()
    model.load_adapter(str(tmp_path / "b"), "b")
    run = torch.compile(model, backend="lorafx", options=REFERENCE)
    torch.manual_seed(1)
    batch = FAMILIES["llama"].inputs(3, 5)

    def check(**kwargs: Any) -> Tensor:
        """The compiled model's logits are those of eager PEFT."""
        want = model(**batch, **kwargs).logits
        assert error(run(**batch, **kwargs).logits, want) <= TOLERANCE
        return want

    results = [check()]
    model.set_adapter("b")
    results.append(check())
    with model.disable_adapter():
        results.append(check())
    for index, one in enumerate(results):
        assert all(error(one, other) > 100 * TOLERANCE for other in results[:index])
    mixed = check(adapter_names=["a", "b", "__base__"])
    other = check(adapter_names=["b", "b", "a"])
    assert error(mixed[1], other[1]) <= TOLERANCE < 0.01 * error(mixed[0], other[0])
