"""Product and delta as one step: the module is as it was before and after, and in copies; what is
no plain call of a linear is followed."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense_merge import REFERENCE, TOLERANCE, check_mixed, error
from quantised import KINDS, adapters, linears, small_base
from tiny_models import FAMILIES
from transformers.models.llama import modeling_llama

import lorafx
from lorafx.eager.linear_calls import LinearCall

pytestmark = pytest.mark.any_sizes

NAMES = ["a1", None, "a3", "a1"]
OPTIONS = {**REFERENCE, "start": "eager", "cache": None}


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(0)
    return FAMILIES["llama"].inputs(len(NAMES), 5)


@pytest.fixture
def inside(monkeypatch):
    """Runs code of the test in each call of the model's MLP, whose class is still known."""
    forward, looks = modeling_llama.LlamaMLP.forward, []

    def looked(self: Any, x: Any) -> Any:
        for look in looks:
            look(self, x)
        return forward(self, x)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", looked)
    return looks


def test_only_while_the_model_runs(llama, inputs, inside):
    seen = set()
    inside.append(lambda mlp, x: seen.update(type(m.forward) for m in mlp.children()))
    cm = llama.compile(options=OPTIONS)
    check_mixed(cm, llama, NAMES, inputs)
    assert LinearCall in seen
    assert all("forward" not in vars(module) for module in cm._orig_mod.modules())
    assert not cm.recompiles

    def fail(mlp: Any, x: Any) -> None:
        raise RuntimeError("as a model's code may")

    inside.append(fail)
    with pytest.raises(RuntimeError, match="as a model's code may"):
        cm(**inputs, adapter_names=NAMES)
    assert all("forward" not in vars(module) for module in cm._orig_mod.modules())


def test_copies_pickles_and_other_threads_have_the_module_s_own_forward(llama, inputs, inside):
    results = []

    def look(mlp: Any, x: Any) -> None:
        def elsewhere() -> None:
            module = mlp.up_proj
            assert isinstance(module.forward, LinearCall)
            others = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
            assert not any(isinstance(other.forward, LinearCall) for other in others)
            own = F.linear(x, module.weight)
            results.append((module.forward(x), own))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    cm = llama.compile(options=OPTIONS)
    inside.append(look)
    cm(**inputs, adapter_names=NAMES)
    assert len(results) == cm._orig_mod.config.num_hidden_layers
    for got, own in results:
        assert torch.equal(got, own)


def test_a_weight_that_is_exchanged_meanwhile_is_followed(llama, inputs, inside):
    results = []

    def look(mlp: Any, x: Any) -> None:
        module, call = mlp.up_proj, mlp.up_proj.forward
        if not isinstance(call, LinearCall):  # of the merged model
            return
        deltas = call.mark.runtime.deltas
        module._parameters["weight"] = mlp.gate_proj.weight
        results.append(deltas.linear(call, x))
        module._parameters["weight"] = call.weight

    cm = llama.compile(options=OPTIONS)
    inside.append(look)
    check_mixed(cm, llama, NAMES, inputs)
    assert set(results) == {None}


@pytest.mark.parametrize("rows", [4, 40])
@pytest.mark.parametrize("kind", ["torchao-int8", "bitsandbytes-nf4"])
def test_quantised_linears_are_one_step(tmp_path, kind, rows):
    """Also those that carry no LoRA, and where rows are many. Numbers are compared in
    tests/model/test_quantized.py."""
    base = small_base()
    folders = adapters(base, tmp_path)
    KINDS[kind][0](base)
    cm = lorafx.compile(base.eval(), folders, options=OPTIONS)
    quantised = [path for path, _ in linears(base)]
    assert len(quantised) > len(cm._session.program.sites)
    ids, names = torch.randint(3, 61, (rows, 3)), ["a", None, "b", "a"] * (rows // 4)
    whole = cm(ids, adapter_names=names).logits
    assert not cm.recompiles
    for name in dict.fromkeys(names):
        of_name = [row for row, other in enumerate(names) if other == name]
        alone = cm(ids[of_name], adapter_names=[name] * len(of_name)).logits
        assert error(whole[of_name], alone) <= TOLERANCE


def _by_numpy(x: torch.Tensor) -> Callable[[], object]:
    memory = x.numpy()
    return lambda: np.multiply(memory, 2, out=memory)


@pytest.mark.parametrize(
    "write",
    [
        _by_numpy,
        lambda x: lambda: torch._foreach_mul_([x], 2.0),
        lambda x: lambda: setattr(x, "data", x.data * 2),
    ],
    ids=["numpy", "foreach", "data"],
)
def test_an_input_that_is_written_between_its_linears_is_read_again(llama, inputs, inside, write):
    def look(mlp: Any, x: Any) -> None:
        x = x.clone()
        written = write(x)
        mlp.gate_proj(x)
        written()
        results.append((mlp.up_proj(x), mlp.up_proj(x.clone())))

    results: list[tuple[Any, Any]] = []
    cm = lorafx.compile(llama.model().half(), llama.folders, options=OPTIONS)
    inside.append(look)
    cm(**inputs, adapter_names=["a1"] * len(NAMES))
    assert not cm.recompiles
    for got, want in results:
        assert torch.equal(got, want)


def test_rows_of_other_memory_are_those_of_that(llama, inputs, inside):
    def look(mlp: Any, x: Any) -> None:
        turned = x.clone()
        mlp.gate_proj(turned)
        turned.data = x.flip(0)
        results.append((mlp.up_proj(turned), mlp.up_proj(x).flip(0)))

    results: list[tuple[Any, Any]] = []
    cm = llama.compile(options=OPTIONS)
    inside.append(look)
    cm(**inputs, adapter_names=["a1", None, None, None])
    assert not cm.recompiles
    for got, want in results:
        assert error(got, want) <= TOLERANCE
