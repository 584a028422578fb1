"""What users of PEFT and torch.compile try by habit: served, or refused with the way out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from dense_merge import REFERENCE, check_mixed
from tiny_models import FAMILIES, token_inputs

import lorafx
from lorafx.errors import CaptureError, ConfigError

pytestmark = pytest.mark.quick

INPUTS = token_inputs(2, 6)
Q = "model.layers.0.self_attn.q_proj"


def wrapped(case: Any) -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(case.model(), str(case.folders["a1"]), "a1").eval()


@pytest.fixture(scope="module")
def cm(llama: Any) -> Any:
    return llama.compile()


def test_a_peft_model_that_is_compiled_again_says_so(in_eager_mode, llama):
    pm = wrapped(llama)
    cm = lorafx.compile(pm, options=REFERENCE)
    for again in (lorafx.compile, lorafx.attach):
        with pytest.raises(CaptureError, match=r"already compiled this PeftModel.*lorafx\.detach"):
            again(pm, options=REFERENCE)
    assert str(lorafx.explain(pm)) == str(cm.explain())
    check_mixed(cm, llama, ["a1", None], INPUTS)
    assert lorafx.detach(pm) is cm._orig_mod
    cm = lorafx.compile(pm, options=REFERENCE)  # it has its adapters again
    check_mixed(cm, llama, ["a1", None], INPUTS)


def test_a_peft_model_that_is_attached_again_says_so(llama):
    pm = wrapped(llama)
    model = lorafx.attach(pm, options=REFERENCE)
    for again in (lorafx.compile, lorafx.attach):
        with pytest.raises(CaptureError, match=r"detach"):
            again(pm, options=REFERENCE)
    lorafx.load_adapter(pm, llama.folders["a0"], "a0")
    assert lorafx.detach(pm) is model
    assert lorafx.attach(pm, options=REFERENCE) is model


def test_a_name_that_is_a_folder_too_is_a_name(cm, llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sql").mkdir()
    cm.load_adapter(str(llama.folders["a1"]), "sql")
    check_mixed(cm, llama, ["a1", None], INPUTS)
    got = cm(**INPUTS, adapter_names=["sql", None]).logits
    assert torch.equal(got, cm(**INPUTS, adapter_names=["a1", None]).logits)
    cm.unload_adapter("sql")


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("get_nb_trainable_parameters", "memory()"),
        ("print_trainable_parameters", "memory()"),
        ("get_model_status", "explain()"),
        ("get_layer_status", "explain()"),
    ],
)
def test_methods_of_peft_name_the_way_out(cm, name, way):
    with pytest.raises(AttributeError, match=re.escape(f"no {name!r}; use {way}")):
        getattr(cm, name)
    assert not hasattr(cm, name)


@pytest.mark.parametrize(
    ("given", "way"),
    [
        ({"fullgraph": True}, r"fullgraph=True: .*explain\(\)"),
        ({"backend": "inductor"}, r"lorafx\.attach"),
        ({"is_trainable": True}, "train with PEFT"),
        ({"adaptors": {}}, "'adaptors'; nearest: adapters"),
        ({"dynamic": "auto"}, "dynamic is True, False or None.*got 'auto'"),
    ],
)
def test_arguments_of_other_libraries_name_the_way_out(llama, given, way):
    model = llama.model()
    with pytest.raises(ConfigError, match=way):
        lorafx.compile(model, llama.folders, options=REFERENCE, **given)
    if "dynamic" not in given:
        with pytest.raises(ConfigError, match=way):
            lorafx.attach(model, llama.folders, options=REFERENCE, **given)
    assert not any(module._forward_hooks for module in model.modules())


def test_what_asks_for_nothing_is_taken(llama):
    nothing = {"fullgraph": False, "disable": False}
    cm = lorafx.compile(llama.model(), llama.folders, options=REFERENCE, **nothing)
    cm.load_adapter(llama.folders["a1"], "same", is_trainable=False, torch_device=None)
    with pytest.raises(ConfigError, match=r"load_adapter takes no is_trainable=True: .*PEFT"):
        cm.load_adapter(llama.folders["a1"], "other", is_trainable=True)
    with pytest.raises(ConfigError, match=r"no argument 'adaptername'; nearest: adapter_name"):
        cm.load_adapter(llama.folders["a1"], adaptername="other")
    assert cm.list_adapters() == [*llama.folders, "same"]


@pytest.mark.parametrize("function", [lorafx.compile, lorafx.attach])
def test_a_third_argument_by_place_is_refused_with_the_way_to_give_both(llama, function):
    model, config = llama.model(), peft.LoraConfig(target_modules=["q_proj"])
    for given in ((llama.folders, config), (config, llama.folders)):
        with pytest.raises(ConfigError, match=r"\(model, lora_config, adapters=\.\.\.\)"):
            function(model, *given)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("dynamic", "graphs"), [pytest.param(True, 1, marks=pytest.mark.slow), (None, 2), (False, 3)]
)
def test_dynamic_is_as_in_torch_compile(plain, dynamic, graphs):
    cm = lorafx.compile(plain.model(), plain.folders, dynamic=dynamic, options=REFERENCE)
    for rows in (2, 3, 4):
        check_mixed(cm, plain, ["a1", *[None] * (rows - 1)], FAMILIES["plain"].inputs(rows, 6))
    assert cm.recompiles == graphs
