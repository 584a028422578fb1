"""A compiled model as other libraries handle modules: names, state, signature, conversions."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
import transformers
from dense_merge import REFERENCE, check_mixed, error
from tiny_models import token_inputs
from torch import nn
from transformers.trainer import TRAINING_ARGS_NAME as TRAINING_ARGS
from transformers.utils.generic import can_return_loss, find_labels

import lorafx
from lorafx.errors import CaptureError, ConfigError

pytestmark = pytest.mark.quick

INPUTS = token_inputs(2, 6)
NAMES = ["a0", "a1"]
SHORT = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def cm(llama: Any) -> Any:
    """For what leaves it as it is, or as it was."""
    return llama.compile()


def check_same(cm: Any, case: Any, before: torch.Tensor) -> None:
    """The same bits as before, which are the oracle's numbers."""
    assert torch.equal(cm(**INPUTS, adapter_names=NAMES).logits, before)
    check_mixed(cm, case, NAMES, INPUTS)


def alone_of(case: Any, use: Callable[[Any, Any], torch.Tensor]) -> torch.Tensor:
    """What `use` of a merged model and of its row returns, for all rows."""
    rows = [{name: value[row : row + 1] for name, value in INPUTS.items()} for row in range(2)]
    return torch.cat([use(case.alone(name), row) for name, row in zip(NAMES, rows, strict=True)])


def test_names_that_it_has_none_of_are_the_models_own(llama, small):
    given = llama.model()
    cm = lorafx.compile(given, llama.folders, options=REFERENCE)
    assert cm._orig_mod is given
    assert cm.model is given.model
    assert cm.model.layers[0] is given.model.layers[0]
    assert isinstance(cm, type(given))
    assert {"load_adapter", "lm_head", "config"} <= {*dir(cm)}
    for holder, other in ((cm, given), (given, cm)):
        holder.own = kept = nn.Linear(2, 2)
        assert other.own is kept
        assert "own.weight" in dict(other.named_parameters())
        del holder.own
        assert not hasattr(other, "own")
        holder.note = "kept"
        assert vars(other)["note"] == "kept"
        del holder.note
        holder.register_buffer("count", torch.ones(1))
        assert other.count is holder.count
        del holder.count
    cm.training = True
    assert given.training
    with pytest.raises(AttributeError):
        del cm.adapters
    plain = small(lambda: nn.Sequential(nn.Linear(6, 7)), ["0"]).compile()
    assert plain.model is plain._orig_mod
    assert len(plain) == 1
    assert plain[0] is plain._orig_mod[0]
    assert [*plain] == [*plain._orig_mod]


def test_settings_are_heard_by_calls_and_generate(cm, monkeypatch):
    one_token = transformers.GenerationConfig(**{**SHORT, "max_new_tokens": 1})
    monkeypatch.setattr(cm, "generation_config", one_token)
    assert cm.generate(**INPUTS, adapter_names=NAMES).shape[1] == INPUTS["input_ids"].shape[1] + 1
    labels = INPUTS["input_ids"]
    before = cm(**INPUTS, labels=labels, adapter_names=NAMES).loss
    own = cm.loss_function
    cm.loss_function = lambda logits, labels, vocab_size, **_: logits.sum() * 0 + 7
    assert cm(**INPUTS, labels=labels, adapter_names=NAMES).loss.item() == 7 != before.item()
    cm.loss_function = own


def test_hooks_run_once_for_each_forward(cm, llama):
    seen = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        seen.append({*kwargs})
        return args, {name: value for name, value in kwargs.items() if name != "adapter_names"}

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        seen.append(module)
        output["logits"] = output["logits"] * -3
        return output

    def hooked(model: Any) -> list[Any]:
        first = model.register_forward_pre_hook(before, with_kwargs=True)
        return [first, model.register_forward_hook(after)]

    def generated(model: Any, row: Any) -> torch.Tensor:
        handles = hooked(model)
        ids = model.generate(**row, **SHORT)
        for handle in handles:
            handle.remove()
        return ids

    plain = cm(**INPUTS, adapter_names=NAMES).logits
    want = alone_of(llama, generated)
    handles = hooked(cm)
    seen.clear()
    assert torch.equal(cm(**INPUTS, adapter_names=NAMES).logits, plain * -3)
    assert seen == [{*INPUTS}, cm._orig_mod]
    seen.clear()
    assert torch.equal(cm.generate(**INPUTS, **SHORT, adapter_names=NAMES), want)
    assert seen[1::2] == [cm._orig_mod] * SHORT["max_new_tokens"]
    seen.clear()
    assert torch.equal(cm.forward(**INPUTS, adapter_names=NAMES).logits, plain)  # as on a model
    for handle in handles:
        handle.remove()
    check_same(cm, llama, plain)
    assert not seen
    with pytest.raises(CaptureError, match="a backward hook would never run"):
        cm.register_full_backward_hook(lambda *_: None)


def test_a_forward_in_place_of_its_own_is_heard_by_calls_and_generate(cm, llama):
    given = []

    def times(model: Any, **fixed: Any) -> Callable[..., Any]:
        own = model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            given.append(kwargs.get("adapter_names"))
            output = own(*args, **kwargs | fixed)
            output["logits"] = output["logits"] * -3
            return output

        return forward

    def generated(model: Any, row: Any) -> torch.Tensor:
        model.forward = times(model)
        ids = model.generate(**row, **SHORT)
        del model.forward
        return ids

    plain = cm(**INPUTS, adapter_names=NAMES).logits
    tokens = cm.generate(**INPUTS, **SHORT, adapter_names=NAMES)
    own, want = cm.forward, alone_of(llama, generated)
    cm.forward = times(cm)
    given.clear()
    assert torch.equal(cm(**INPUTS, adapter_names=NAMES).logits, plain * -3)
    assert given == [NAMES]
    assert torch.equal(cm.generate(**INPUTS, **SHORT, adapter_names=NAMES), want)
    assert len(given) == 1 + SHORT["max_new_tokens"]
    cm.set_adapter("a1")
    assert error(cm(**INPUTS).logits[1], plain[1] * -3) <= 1e-5
    cm.set_adapter(None)
    cm.forward = lambda input_ids, attention_mask: own(input_ids, attention_mask)
    check_same(cm, llama, plain)  # which takes no names
    cm.forward = own
    cm.forward = times(cm, adapter_names=NAMES[::-1])  # which chooses others
    got, other = cm(**INPUTS, adapter_names=NAMES).logits, own(**INPUTS, adapter_names=NAMES[::-1])
    assert torch.equal(got, other.logits * -3)
    del cm.forward
    check_same(cm, llama, plain)
    assert torch.equal(cm.generate(**INPUTS, **SHORT, adapter_names=NAMES), tokens)
    assert "forward" not in vars(cm._orig_mod)


@pytest.mark.parametrize("start", ["compiled", "eager"])
def test_functional_call_has_the_weights_of_the_call(cm, llama, start):
    cm = cm if start == "compiled" else llama.compile({"start": start})
    before = cm(**INPUTS, adapter_names=NAMES).logits
    own = {name: value.clone() for name, value in cm.state_dict().items()}
    state = {name: value * 1.25 for name, value in own.items()}

    def changed(model: Any, row: Any) -> torch.Tensor:
        added = {n: value - own[n] + state[n] for n, value in model.state_dict().items()}
        return torch.func.functional_call(model, added, (), row).logits

    for _ in range(2):
        given = {**INPUTS, "adapter_names": NAMES}
        got = torch.func.functional_call(cm, state, (), given).logits
        assert error(got, alone_of(llama, changed)) <= 1e-5
        assert error(cm(**INPUTS, adapter_names=NAMES).logits, before) <= 1e-6


def test_a_copy_by_the_models_own_method_is_refused_too(small):
    class Copied(nn.Sequential):
        def __deepcopy__(self, memo: Any) -> Any:
            return Copied(*self)

    cm = small(lambda: Copied(nn.Linear(6, 7)).eval(), ["0"]).compile()
    for copied in (copy.copy, copy.deepcopy):
        with pytest.raises(CaptureError, match="cannot be copied"):
            copied(cm)


def test_forward_has_the_signature_of_the_models_own(cm):
    model = cm._orig_mod
    for got, own in ((cm.forward, model.forward), (type(cm).forward, type(model).forward)):
        found, wanted = (inspect.signature(method).parameters for method in (got, own))
        assert found.keys() - wanted.keys() == {"adapter_names", "adapter_slots", "adapter_gates"}
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
    assert list(found) == ["x", "return_loss", "adapter_names", "adapter_slots", "adapter_gates"]


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


def test_a_module_around_it_has_its_names_too(cm, llama):
    around = nn.ModuleDict({"lm": cm})
    state = around.state_dict()
    assert [key.removeprefix("lm.") for key in state] == list(cm._orig_mod.state_dict())
    assert [f"lm.{name}" for name, _ in cm.named_parameters()] == [
        name for name, _ in around.named_parameters()
    ]
    around.load_state_dict({key: value.clone() for key, value in state.items()})
    check_mixed(cm, llama, NAMES, INPUTS)


def test_its_state_is_loaded_into_it_and_into_other_models(cm, llama):
    changed = llama.model()
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
    check_same(cm, llama, before)


def test_it_is_saved_as_its_model(cm, tmp_path):
    cm.save_pretrained(tmp_path)
    saved = type(cm._orig_mod).from_pretrained(tmp_path).state_dict()
    assert saved.keys() == cm.state_dict().keys()
    assert all(torch.equal(saved[key], value) for key, value in cm.state_dict().items())


def test_trainers_give_it_settings_and_save_it_as_its_model(llama, tmp_path):
    cm = llama.compile()
    settings = transformers.GenerationConfig(**SHORT)
    arguments = transformers.Seq2SeqTrainingArguments(
        str(tmp_path), predict_with_generate=True, generation_config=settings, use_cpu=True
    )
    trainer = transformers.Seq2SeqTrainer(cm, arguments)
    assert cm._orig_mod.generation_config.max_new_tokens == SHORT["max_new_tokens"]
    trainer.save_model(str(tmp_path / "saved"))
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", TRAINING_ARGS}
    again = type(cm._orig_mod).from_pretrained(tmp_path / "saved")
    assert again.generation_config.max_new_tokens == SHORT["max_new_tokens"]
    saved = again.state_dict()
    assert saved.keys() == cm.state_dict().keys()
    assert all(torch.equal(saved[key], value) for key, value in cm.state_dict().items())


def test_training_mode_is_the_models(cm):
    with pytest.warns(lorafx.LorafxWarning, match="training mode"):
        assert cm.train() is cm
    assert cm._orig_mod.training
    assert all(m.training for m in cm.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error", lorafx.LorafxWarning)
        cm.train()  # once
        cm.eval()
    assert not any(m.training for m in (cm, *cm._orig_mod.modules()))
    cm._orig_mod.train()
    ids = torch.tensor([[5, 6]])
    with pytest.warns(lorafx.LorafxWarning, match="dropout is active"):
        cm(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error", lorafx.LorafxWarning)
        cm(ids)
    cm.eval()


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
def test_a_conversion_is_refused_at_once_and_changes_nothing(cm, llama, convert, wanted):
    before = cm(**INPUTS, adapter_names=NAMES).logits
    places = [parameter.data_ptr() for parameter in cm.parameters()]
    with pytest.raises(CaptureError, match=f"float32 on cpu, not for {wanted}: detach"):
        convert(cm)
    assert cm.float().to("cpu").to(torch.float32).cpu() is cm
    assert [parameter.data_ptr() for parameter in cm.parameters()] == places
    check_same(cm, llama, before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_changes_nothing(cm, llama):
    before = cm(**INPUTS, adapter_names=NAMES).logits
    for move in (cm.cuda, lambda: cm.to("cuda")):
        with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
            move()
        check_same(cm, llama, before)


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


@pytest.mark.parametrize(
    "prepare",
    ["prepare", pytest.param("prepare in half precision", marks=pytest.mark.slow), "hook"],
)
def test_accelerate_prepares_it_and_hangs_hooks_on_it(cm, llama, prepare):
    cm = llama.compile() if "half" in prepare else cm
    want, dtypes = cm(**INPUTS, adapter_names=NAMES).logits, set()
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
    if "half" not in prepare:
        accelerate.hooks.remove_hook_from_module(cm)
        return
    cm.lm_head.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    # Not tokens: in bfloat16 the two largest logits of a row may be equal.
    told = {"output_logits": True, "return_dict_in_generate": True}
    told |= {**SHORT, "max_new_tokens": 1}  # each step would be a graph of its own
    first = cm.generate(**INPUTS, **told, adapter_names=NAMES).logits[0]
    assert (first - want[:, -1]).abs().max() <= 0.1 * want.abs().max()
    cm(**INPUTS, adapter_names=NAMES)
    assert dtypes == {torch.bfloat16}
    assert accelerator.unwrap_model(cm, keep_fp32_wrapper=False) is cm
    dtypes.clear()
    check_same(cm, llama, want)
    cm.generate(**INPUTS, **told, adapter_names=NAMES)
    assert dtypes == {torch.float32}


def test_a_model_that_accelerate_offloads_is_refused_before_anything_changes(case_of):
    model = case_of("llama").model()
    accelerate.cpu_offload(model)
    hooks = {path: getattr(m, "_hf_hook", None) for path, m in model.named_modules()}
    with pytest.raises(CaptureError, match=r"weights of \S+ are offloaded by accelerate.*load the"):
        lorafx.compile(model, options=REFERENCE)
    assert hooks == {path: getattr(m, "_hf_hook", None) for path, m in model.named_modules()}


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
