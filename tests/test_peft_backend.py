"""`torch.compile(peft_model, backend="lorafx")` equals eager PEFT, whatever switch is thrown."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import TOLERANCE, error, random_base, save_adapter
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from tiny_models import FAMILIES
from torch import Tensor, nn

from lorafx.torch_compile.peft_graph import recent_records

REFERENCE = {"lowering": "reference"}
SHALLOW = {"num_hidden_layers": 1}
LINEARS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen3": ["q_proj", "o_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc", "mlp.c_proj"],
    "bert": ["query", "key", "intermediate.dense"],
    "t5": ["q", "k", "v", "wi"],
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.fixture
def peft_model(tmp_path: Path) -> Callable[..., PeftModel]:
    """A tiny model with adapters that PEFT saved and read back."""

    def make(
        family: str = "llama",
        adapters: Sequence[str] = ("a",),
        *,
        targets: Any = None,
        dtype: torch.dtype = torch.float32,
        changes: Mapping[str, Any] = SHALLOW,
        **config: Any,
    ) -> PeftModel:
        base = random_base(family, **changes)
        settings = {**FAMILIES[family].config, **config}
        folders = [
            save_adapter(
                base,
                tmp_path / name,
                rank=3 + index,
                seed=index,
                targets=targets or LINEARS[family],
                **settings,
            )
            for index, name in enumerate(adapters)
        ]
        base = base.to(dtype)
        model = PeftModel.from_pretrained(base, str(folders[0]), adapters[0])
        for name, folder in zip(adapters[1:], folders[1:], strict=True):
            model.load_adapter(str(folder), name)
        return model.eval()

    return make


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="lorafx", options={**REFERENCE, **options})


def inputs(family: str = "llama", rows: int = 3, length: int = 5) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return FAMILIES[family].inputs(rows, length)


def logits(model: Any, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
    return model(**batch, **kwargs).logits


def rewritten_by(call: Callable[[], Any]) -> int:
    """How many adapters at modules the frames that `call` compiles hold as one op."""
    before = recent_records()
    call()
    return sum(len(record.sites) for record in recent_records() if record not in before)


def layers(model: nn.Module) -> int:
    return sum(isinstance(module, LoraLayer) for module in model.modules())


def check(run: Any, model: PeftModel, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
    """The compiled model's logits are those of eager PEFT."""
    got, want = logits(run, batch, **kwargs), logits(model, batch, **kwargs)
    assert error(got, want) <= TOLERANCE
    return want


def mean_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).abs().mean())


@pytest.mark.parametrize("family", sorted(LINEARS))
def test_one_adapter(peft_model: Callable[..., PeftModel], family: str) -> None:
    model, batch = peft_model(family, changes={}), inputs(family)
    run = compiled(model)
    assert rewritten_by(lambda: check(run, model, batch)) == layers(model) > 0
    with model.disable_adapter():
        base = logits(model, batch)
    assert error(logits(run, batch), base) > 100 * TOLERANCE


def test_inductor_lowering(peft_model: Callable[..., PeftModel]) -> None:
    """The generated kernel, also where batch and length are symbols."""
    model = peft_model(targets=["q_proj", "down_proj"])
    run = torch.compile(model, backend="lorafx", dynamic=True)
    assert rewritten_by(lambda: check(run, model, inputs(rows=2, length=7))) == 2
    assert rewritten_by(lambda: check(run, model, inputs(rows=3, length=4))) == 0


def test_switches(peft_model: Callable[..., PeftModel]) -> None:
    """Each switch of PEFT has its effect on a model that is compiled already."""
    model, batch = peft_model(adapters=("a", "b")), inputs()
    run, count = compiled(model), layers(model)
    results = [check(run, model, batch)]
    model.set_adapter("b")  # another scaling too, of which Dynamo makes an input
    assert rewritten_by(lambda: results.append(check(run, model, batch))) == count
    with model.disable_adapter():
        assert rewritten_by(lambda: results.append(check(run, model, batch))) == 0
    model.base_model.set_adapter(["a", "b"], inference_mode=True)
    assert rewritten_by(lambda: results.append(check(run, model, batch))) == 2 * count
    for index, one in enumerate(results):
        assert all(error(one, other) > 100 * TOLERANCE for other in results[:index])
    model.set_adapter("a")
    assert error(check(run, model, batch), results[0]) == 0
    model.merge_adapter()
    assert rewritten_by(lambda: check(run, model, batch)) == 0
    model.unmerge_adapter()
    check(run, model, batch)


def test_layers_compiled_by_themselves(peft_model: Callable[..., PeftModel]) -> None:
    """A decoder layer, and a `LoraLayer` whose caller Dynamo does not trace."""
    model, batch = peft_model(), inputs()
    want = logits(model, batch)
    (layer,) = model.base_model.model.model.layers
    module = layer.self_attn.q_proj
    forward, module.forward = module.forward, compiled(module.forward)
    assert rewritten_by(lambda: logits(model, batch)) == 1
    assert error(logits(model, batch), want) <= TOLERANCE
    module.forward = forward
    layer.compile(backend="lorafx", options=REFERENCE)
    assert rewritten_by(lambda: logits(model, batch)) == layers(model)
    assert error(logits(model, batch), want) <= TOLERANCE


def test_weighted_adapter(peft_model: Callable[..., PeftModel]) -> None:
    model, batch = peft_model(adapters=("a", "b")), inputs()
    run = compiled(model)
    check(run, model, batch)
    model.add_weighted_adapter(["a", "b"], [0.3, 0.7], "c", combination_type="cat")
    model.set_adapter("c")
    assert rewritten_by(lambda: check(run, model, batch)) == layers(model)


def test_mixed_batch(peft_model: Callable[..., PeftModel]) -> None:
    """PEFT's own mixed batches are computed as PEFT does."""
    model, batch = peft_model(adapters=("a", "b")), inputs()
    run = compiled(model)
    for names in (["a", "b", "__base__"], ["b", "b", "a"]):
        check(run, model, batch, adapter_names=names)


def test_changed_weights(peft_model: Callable[..., PeftModel]) -> None:
    """Weights are inputs: an in-place update has its effect, and compiles nothing."""
    model, batch = peft_model(), inputs()
    run = compiled(model)
    before = check(run, model, batch)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(-2)
        elif "down_proj.base_layer" in name:
            parameter.data.add_(0.5)
    assert rewritten_by(lambda: check(run, model, batch)) == 0
    assert error(logits(run, batch), before) > 100 * TOLERANCE


def test_two_models_of_one_class(peft_model: Callable[..., PeftModel]) -> None:
    model, batch = peft_model(), inputs()
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.mul_(0.7)
    runs = compiled(model), compiled(other)
    assert error(check(runs[0], model, batch), check(runs[1], other, batch)) > 100 * TOLERANCE
    check(runs[0], model, batch)


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"o_proj": 7}},
        {"lora_alpha": 3},  # a scaling of 1
        {"lora_dropout": 0.3},
        {"lora_bias": True, "bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=lambda config: next(iter(config)),
)
def test_settings(peft_model: Callable[..., PeftModel], config: dict[str, Any]) -> None:
    model, batch = peft_model(**config), inputs()
    if "lora_bias" in config or "modules_to_save" in config:
        for name, parameter in model.named_parameters():
            if "lora_B.a.bias" in name or "modules_to_save.a" in name:
                nn.init.normal_(parameter, std=0.3)
    run = compiled(model)
    assert rewritten_by(lambda: check(run, model, batch)) == layers(model)


def test_dora_stays_as_it_is(peft_model: Callable[..., PeftModel]) -> None:
    model, batch = peft_model(use_dora=True, targets=["q_proj", "down_proj"]), inputs()
    run = compiled(model)
    assert rewritten_by(lambda: check(run, model, batch)) == 0


def test_embedding_beside_linears(peft_model: Callable[..., PeftModel]) -> None:
    model, batch = peft_model(targets=["embed_tokens", "q_proj"]), inputs()
    run = compiled(model)
    assert rewritten_by(lambda: check(run, model, batch)) == 1


@pytest.mark.parametrize("autocast_adapters", [True, False])
@pytest.mark.parametrize("active", [["a"], ["a", "b"]])
def test_bfloat16(
    peft_model: Callable[..., PeftModel], autocast_adapters: bool, active: list[str]
) -> None:
    """A bfloat16 base under float32 adapters (PEFT's default) and under bfloat16 ones rounds no
    worse than eager PEFT does."""
    model, batch = peft_model(adapters=("a", "b"), dtype=torch.bfloat16), inputs()
    if not autocast_adapters:
        model = model.to(torch.bfloat16)
    model.base_model.set_adapter(active, inference_mode=True)
    run = compiled(model)
    got = logits(run, batch)
    assert sum(len(r.sites) for r in recent_records()[-1:]) == layers(model) * len(active)
    want = logits(copy.deepcopy(model).double(), batch)
    assert got.dtype == torch.bfloat16
    assert mean_error(got, want) <= 1.2 * mean_error(logits(model, batch), want)


def test_autocast(peft_model: Callable[..., PeftModel]) -> None:
    model, batch = peft_model(), inputs()
    run = compiled(model)
    want = logits(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager, got = logits(model, batch), logits(run, batch)
    assert mean_error(got, want) <= 1.2 * mean_error(eager, want)


def test_training_is_inductor_s(peft_model: Callable[..., PeftModel]) -> None:
    """Where gradients are wanted nothing is rewritten: loss and gradients are Inductor's."""
    model, batch = peft_model(targets=["q_proj", "down_proj"]), inputs()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)

    def step(backend: str) -> list[Tensor]:
        torch._dynamo.reset()
        twin = copy.deepcopy(model).train()
        with torch.enable_grad():
            loss = torch.compile(twin, backend=backend)(**batch, labels=batch["input_ids"]).loss
            loss.backward()
        grads = [parameter.grad for parameter in twin.parameters() if parameter.requires_grad]
        return [loss.detach(), *[grad for grad in grads if grad is not None]]

    got: list[Tensor] = []
    assert rewritten_by(lambda: got.extend(step("lorafx"))) == 0
    expected = step("inductor")
    assert len(expected) == len(got) == 5
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_without_lora_it_is_inductor(peft_model: Callable[..., PeftModel]) -> None:
    """Merged: the same bits as Inductor's."""
    model, batch = peft_model(targets=["q_proj", "down_proj"]), inputs()
    model.merge_adapter()
    got = logits(torch.compile(model, backend="lorafx"), batch)
    torch._dynamo.reset()
    assert torch.equal(got, logits(torch.compile(model, backend="inductor"), batch))


def test_generate(peft_model: Callable[..., PeftModel]) -> None:
    model, batch = peft_model(), inputs()
    settings = {"max_new_tokens": 5, "do_sample": False, "disable_compile": True}
    want = model.generate(**batch, **settings)
    model.base_model.model.forward = compiled(model.base_model.model.forward)
    got: list[Tensor] = []
    assert rewritten_by(lambda: got.append(model.generate(**batch, **settings))) > 0
    assert torch.equal(got[0], want)


def test_dump(peft_model: Callable[..., PeftModel], tmp_path: Path) -> None:
    model = peft_model(targets=["q_proj"])
    logits(compiled(model, dump=str(tmp_path / "dump")), inputs())
    (folder,) = (tmp_path / "dump").iterdir()
    assert "lorafx.factors" in (folder / "01-factors.py").read_text()
    lines = recent_records()[-1].lines()
    assert sum("layers.0.self_attn.q_proj: 24 -> 24, rank 3" in line for line in lines) == 1
