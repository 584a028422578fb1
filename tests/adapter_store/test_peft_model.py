"""Taking over a PeftModel: the adapters as PEFT applies them, the base as it was before."""

from __future__ import annotations

import peft
import pytest
import torch

from lorafx.adapter_store.peft_model import is_peft_model, take_over
from lorafx.adapter_store.peft_reader import read_adapter
from lorafx.errors import CheckpointError, UnsupportedAdapterError

pytestmark = [pytest.mark.usefixtures("fixed_sizes"), pytest.mark.filterwarnings("ignore")]

IDS = torch.arange(12).reshape(2, 6)


def wrapped(base, *configs):
    """`base` with adapters a, b, ... whose factors are all non-zero."""
    model = None
    for name, config in zip("abc", configs, strict=False):
        config = peft.LoraConfig(**config)
        if model is None:
            model = peft.get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad or parameter.abs().sum() == 0:
                parameter.normal_(std=0.3)
    return model.eval()


def logits(model, **kwargs):
    with torch.no_grad():
        return model(input_ids=IDS, **kwargs).logits


def test_base_and_adapters(build, sites_of, save, tmp_path):
    model = wrapped(
        build("llama"),
        {"r": 2, "target_modules": ["q_proj", "embed_tokens"]},
        {"r": 3, "target_modules": ["v_proj", "up_proj"], "use_rslora": True},
    )
    model.save_pretrained(str(tmp_path))
    names = set(dict(build("llama").named_modules()))
    taken = take_over(model)
    base, adapters = taken.base, taken.adapters
    assert is_peft_model(model)
    assert not is_peft_model(base)
    assert set(dict(base.named_modules())) == names
    assert list(adapters) == ["a", "b"]
    assert torch.equal(logits(base), logits(build("llama")))
    for name, state in adapters.items():
        memory = read_adapter(state, name, sites_of(base), model=base)
        disk = read_adapter(tmp_path / name, name, sites_of(base), model=base)
        assert set(memory.weights) == set(disk.weights)
        for path, (a, b, scale, *_) in disk.weights.items():
            assert torch.equal(a, memory.weights[path].A)
            assert torch.equal(b, memory.weights[path].B)
            assert scale == memory.weights[path].scale


def test_live_scales_win(build, sites_of):
    model = wrapped(build("llama"), {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]})
    model.base_model.model.model.layers[1].self_attn.q_proj.set_scale("a", 0.5)
    taken = take_over(model)
    base, adapters = taken.base, taken.adapters
    weights = read_adapter(adapters["a"], "a", sites_of(base), model=base).weights
    scales = [weights[f"model.layers.{i}.self_attn.q_proj"].scale for i in (0, 1)]
    assert scales == [3.0, 1.5]


def test_merged_adapters_are_refused_and_nothing_changes(build):
    model = wrapped(build("llama"), {"r": 2, "target_modules": ["q_proj"]})
    model.merge_adapter()
    with pytest.raises(CheckpointError, match=r"a are merged .*unmerge_adapter"):
        take_over(model)
    model.unmerge_adapter()
    assert list(take_over(model).adapters) == ["a"]


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (peft.LoraConfig(target_modules=["q_proj"], use_qalora=True), "use_qalora"),
        (peft.LoHaConfig(target_modules=["q_proj"]), "peft_type = 'LOHA'"),
    ],
)
def test_unsupported_adapters_leave_the_model_alone(config, field, build):
    model = peft.get_peft_model(build("llama"), config).eval()
    before, names = logits(model), set(dict(model.named_modules()))
    with pytest.raises(UnsupportedAdapterError, match=field):
        take_over(model)
    assert set(dict(model.named_modules())) == names
    assert torch.equal(logits(model), before)
