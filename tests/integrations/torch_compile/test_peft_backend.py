"""`torch.compile(peft_model, backend="lorafx")` is PEFT's own answer, whatever switch is thrown."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import TOLERANCE, error, random_base, save_adapter
from peft import PeftModel
from tiny_models import FAMILIES, Family, PlainModel, plain_inputs
from torch import Tensor, nn

REFERENCE = {"lowering": "reference"}
TARGETS = {
    "llama": ["q_proj", "o_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "bert": ["query", "intermediate.dense"],
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.fixture
def peft_model(tmp_path: Path) -> Callable[..., PeftModel]:
    """A tiny model with adapters that PEFT saved and read back."""

    def make(family: str = "llama", adapters: Sequence[str] = ("a", "b")) -> PeftModel:
        base, config = random_base(family, num_hidden_layers=1), FAMILIES[family].config
        model = None
        for index, name in enumerate(adapters):
            folder = tmp_path / name
            save_adapter(
                base, folder, rank=3 + index, seed=index, targets=TARGETS[family], **config
            )
            if model is None:
                model = PeftModel.from_pretrained(copy.deepcopy(base), str(folder), name)
            else:
                model.load_adapter(str(folder), name)
        assert model is not None
        return model.eval()

    return make


def compiled(model: PeftModel) -> Any:
    return torch.compile(model, backend="lorafx", options=REFERENCE)


def inputs(family: str = "llama") -> dict[str, Tensor]:
    torch.manual_seed(1)
    return FAMILIES[family].inputs(3, 5)


def logits(model: Any, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
    return model(**batch, **kwargs).logits


def check(run: Any, model: PeftModel, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
    """The compiled model's logits are those of eager PEFT."""
    got, want = logits(run, batch, **kwargs), logits(model, batch, **kwargs)
    assert error(got, want) <= TOLERANCE
    return want


@pytest.mark.parametrize("family", sorted(TARGETS))
def test_one_adapter(peft_model: Callable[..., PeftModel], family: str) -> None:
    model, batch = peft_model(family, ["a"]), inputs(family)
    run = compiled(model)
    want = check(run, model, batch)
    with model.disable_adapter():
        assert error(check(run, model, batch), want) > 100 * TOLERANCE


@pytest.mark.slow
def test_switches(peft_model: Callable[..., PeftModel]) -> None:
    """Each switch of PEFT has its effect on a model that is compiled already."""
    model, batch = peft_model(), inputs()
    run = compiled(model)
    results = [check(run, model, batch)]
    model.set_adapter("b")
    results.append(check(run, model, batch))
    with model.disable_adapter():
        results.append(check(run, model, batch))
    model.base_model.set_adapter(["a", "b"], inference_mode=True)
    results.append(check(run, model, batch))
    for index, one in enumerate(results):
        assert all(error(one, other) > 100 * TOLERANCE for other in results[:index])
    model.set_adapter("a")
    model.merge_adapter()
    assert error(check(run, model, batch), results[0]) <= TOLERANCE
    model.unmerge_adapter()
    assert error(check(run, model, batch), results[0]) <= TOLERANCE


def test_mixed_batch(peft_model: Callable[..., PeftModel]) -> None:
    """PEFT's own mixed batches are computed as PEFT does."""
    model, batch = peft_model(), inputs()
    run = compiled(model)
    first = check(run, model, batch, adapter_names=["a", "b", "__base__"])
    other = check(run, model, batch, adapter_names=["b", "b", "a"])
    assert error(first[1], other[1]) <= TOLERANCE < 0.01 * error(first[0], other[0])


class Labelled(PlainModel):
    """Of few kernels: the C++ compiler takes a second for each."""

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        out = super().forward(ids)
        if labels is not None:
            out["loss"] = nn.functional.cross_entropy(out["logits"].mT, labels)
        return out


@pytest.mark.slow
def test_it_is_inductor_s(tmp_path: Path) -> None:
    """Logits, and the loss and gradients of a training step, have the bits of Inductor's."""
    base = random_base(Family(lambda **_: Labelled(), ()))
    save_adapter(base, tmp_path / "a", rank=3, targets=["up", "gate", "head"])
    model = PeftModel.from_pretrained(base, str(tmp_path / "a"), "a").eval()
    torch.manual_seed(1)
    batch = plain_inputs(3, 5)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)

    def results(backend: str) -> list[Tensor]:
        torch._dynamo.reset()
        twin = copy.deepcopy(model)
        found = [torch.compile(twin, backend=backend)(**batch)["logits"]]
        with torch.enable_grad():
            out = torch.compile(twin.train(), backend=backend)(**batch, labels=batch["ids"])
            out["loss"].backward()
        grads = [parameter.grad for parameter in twin.parameters() if parameter.requires_grad]
        return [*found, out["loss"].detach(), *[grad for grad in grads if grad is not None]]

    got, expected = results("lorafx"), results("inductor")
    assert len(expected) == len(got) == 2 + 6
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_log_names_the_way_to_mixed_batches_once(
    peft_model: Callable[..., PeftModel], caplog: pytest.LogCaptureFixture
) -> None:
    for family in ("llama", "bert"):
        caplog.clear()
        model, batch = peft_model(family), inputs(family)
        run = compiled(model)
        check(run, model, batch)
        model.set_adapter("b")
        check(run, model, batch)
        [record] = [record for record in caplog.records if record.name == "lorafx"]
        text = record.getMessage()
        assert f"of {type(model).__name__}: PEFT's own layers are compiled as they are" in text
        assert "lorafx.attach(model) serves" in text
