"""A compiled model as other libraries handle modules: names, state, signature, conversions."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
import transformers
from dense_merge import REFERENCE, check_mixed
from tiny_models import token_inputs
from torch import nn
from transformers.utils.generic import can_return_loss, find_labels

import lorafx
from lorafx.errors import CaptureError, ConfigError

pytestmark = [pytest.mark.usefixtures("fixed_sizes"), pytest.mark.quick]

INPUTS = token_inputs(2, 6)
NAMES = ["a0", "a1"]


@pytest.fixture(scope="module")
def cm(shallow: Any) -> Any:
    """For what leaves it as it is."""
    return shallow.compile(dynamic=False)


def check_same(cm: Any, case: Any, before: torch.Tensor) -> None:
    """The same bits as before, which are the oracle's numbers."""
    assert torch.equal(cm(**INPUTS, adapter_names=NAMES).logits, before)
    check_mixed(cm, case, NAMES, INPUTS)


def test_forward_has_the_signature_of_the_models_own(cm):
    model = cm._orig_mod
    for got, own in ((cm.forward, model.forward), (type(cm).forward, type(model).forward)):
        found, wanted = (inspect.signature(method).parameters for method in (got, own))
        assert found.keys() - wanted.keys() == {"adapter_names", "adapter_slots"}
        assert [name for name in found if name in wanted] == list(wanted)
        assert all(found[name] == wanted[name] for name in wanted)
    assert find_labels(type(cm)) == ["labels"]


def test_a_class_of_models_whose_loss_is_asked_for_says_so(small):
    class TwoTowers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 7)

        def forward(self, x: torch.Tensor, return_loss: bool = True, *, adapter_names: Any = None):
            return {"logits": self.first(x)}

    case = small(TwoTowers, ["first"])
    compiled = case.compile()
    assert can_return_loss(type(compiled))
    found = inspect.signature(compiled.forward).parameters
    assert list(found) == ["x", "return_loss", "adapter_names", "adapter_slots"]


def test_parameters_modules_and_state_have_the_models_own_names(cm):
    model = cm._orig_mod
    assert list(cm.state_dict()) == list(model.state_dict())
    for members in ("named_parameters", "named_buffers", "named_children"):
        got, own = (list(getattr(module, members)()) for module in (cm, model))
        assert [name for name, _ in got] == [name for name, _ in own]
        assert all(mine is theirs for (_, mine), (_, theirs) in zip(got, own, strict=True))
    assert [name for name, _ in cm.named_modules()] == [name for name, _ in model.named_modules()]
    for name, module in model.named_modules():
        assert cm.get_submodule(name) is (module if name else cm)
    for name, parameter in model.named_parameters():
        assert cm.get_parameter(name) is parameter


def test_a_module_around_it_has_its_names_too(cm, shallow):
    around = nn.ModuleDict({"lm": cm})
    state = around.state_dict()
    assert [key.removeprefix("lm.") for key in state] == list(cm._orig_mod.state_dict())
    assert [f"lm.{name}" for name, _ in cm.named_parameters()] == [
        name for name, _ in around.named_parameters()
    ]
    around.load_state_dict({key: value.clone() for key, value in state.items()})
    check_mixed(cm, shallow, NAMES, INPUTS)


def test_its_state_is_loaded_into_it_and_into_other_models(shallow):
    cm, changed = shallow.compile(dynamic=False), shallow.model()
    before = cm(**INPUTS, adapter_names=NAMES).logits
    state = copy.deepcopy(cm.state_dict())
    changed.load_state_dict(state)
    for parameter in changed.parameters():
        parameter.mul_(1.25)
    cm.load_state_dict(changed.state_dict())
    assert not torch.allclose(cm(**INPUTS, adapter_names=NAMES).logits, before, atol=1e-3)
    assert all(torch.equal(cm.state_dict()[key], own) for key, own in changed.state_dict().items())
    with pytest.raises(ConfigError, match=r"assign=True.*leave out assign"):
        cm.load_state_dict(state, assign=True)
    cm.load_state_dict(state)
    check_same(cm, shallow, before)


def test_it_is_saved_as_its_model(cm, tmp_path):
    cm.save_pretrained(tmp_path)
    saved = type(cm._orig_mod).from_pretrained(tmp_path).state_dict()
    assert saved.keys() == cm.state_dict().keys()
    assert all(torch.equal(saved[key], value) for key, value in cm.state_dict().items())


def test_training_mode_is_the_models(cm):
    with pytest.warns(lorafx.LorafxWarning, match="training mode"):
        assert cm.train() is cm
    assert cm._orig_mod.training
    assert all(m.training for m in cm.modules())
    cm.eval()
    assert not any(m.training for m in (cm, *cm._orig_mod.modules()))


@pytest.mark.parametrize(
    ("convert", "wanted"),
    [
        (lambda m: m.half(), r"torch\.float16 on cpu"),
        (lambda m: m.bfloat16(), r"torch\.bfloat16 on cpu"),
        (lambda m: m.to(torch.float64), r"torch\.float64 on cpu"),
        (lambda m: m.to(dtype=torch.float16), r"torch\.float16 on cpu"),
        (lambda m: m.to("meta"), r"torch\.float32 on meta"),
        (lambda m: m.to_empty(device="meta"), r"torch\.float32 on meta"),
        (lambda m: nn.ModuleList([m]).half(), r"torch\.float16 on cpu"),
    ],
)
def test_a_conversion_is_refused_at_once_and_changes_nothing(cm, shallow, convert, wanted):
    before = cm(**INPUTS, adapter_names=NAMES).logits
    places = [parameter.data_ptr() for parameter in cm.parameters()]
    with pytest.raises(CaptureError, match=f"float32 on cpu, not for {wanted}: detach"):
        convert(cm)
    assert cm.float().to("cpu").to(torch.float32).cpu() is cm
    assert [parameter.data_ptr() for parameter in cm.parameters()] == places
    check_same(cm, shallow, before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_changes_nothing(cm, shallow):
    before = cm(**INPUTS, adapter_names=NAMES).logits
    for move in (cm.cuda, lambda: cm.to("cuda")):
        with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
            move()
        check_same(cm, shallow, before)


def test_a_loss_that_is_asked_for_gradients_says_that_there_are_none(cm):
    loss = cm(**INPUTS, labels=INPUTS["input_ids"]).loss
    loss /= 2  # as loops that gather gradients do
    with pytest.raises(CaptureError, match=r"for inference.*train with PEFT.*load_adapter"):
        loss.backward()
    with torch.no_grad():
        quiet = cm(**INPUTS, labels=INPUTS["input_ids"]).loss
    assert torch.equal(loss, quiet / 2)
    assert not quiet.requires_grad
    assert not cm(**INPUTS).logits.requires_grad


@pytest.mark.parametrize("prepare", ["prepare", "prepare in half precision", "hook"])
def test_accelerate_prepares_it_and_hangs_hooks_on_it(shallow, prepare):
    cm = shallow.compile(dynamic=False)
    want = cm(**INPUTS, adapter_names=NAMES).logits
    if prepare == "hook":
        got = accelerate.hooks.add_hook_to_module(cm, accelerate.hooks.ModelHook())
    else:
        accelerate.state.AcceleratorState._reset_state(True)
        half = "bf16" if "half" in prepare else "no"
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=half)
        got = accelerator.prepare_model(cm, evaluation_mode=True)
        assert accelerator.unwrap_model(got) is cm
    assert "labels" in inspect.signature(got.forward).parameters
    found = got(**INPUTS, adapter_names=NAMES).logits
    assert found.dtype == torch.float32
    assert (found - want).abs().max() <= (0.1 if "half" in prepare else 0) * want.abs().max()


def test_a_collator_that_asks_the_model_for_decoder_ids_gets_its_own(case_of):
    case = case_of("t5")
    cm = lorafx.compile(case.model(), case.folders, options=REFERENCE)
    cm.set_adapter("a0")
    labels = torch.arange(3, 9).view(1, 6)
    make: Callable[..., Any] = transformers.DataCollatorForSeq2Seq
    row = {"input_ids": [3, 4, 5], "labels": labels[0].tolist()}

    class Padding:
        padding_side = "right"

        def pad(self, features: Any, **_: Any) -> dict[str, torch.Tensor]:
            return {"input_ids": torch.tensor([own["input_ids"] for own in features])}

    batch, own = (make(Padding(), model=model)([dict(row)]) for model in (cm, case.base))
    assert torch.equal(batch["decoder_input_ids"], own["decoder_input_ids"])
