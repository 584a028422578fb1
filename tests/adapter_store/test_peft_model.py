"""Taking over a PeftModel: the adapters as PEFT applies them, the base as it was before."""

from __future__ import annotations

import peft
import pytest
import torch

from lorafx.adapter_store.peft_model import is_peft_model, take_over
from lorafx.adapter_store.peft_reader import read_adapter
from lorafx.errors import CaptureError, CheckpointError, UnsupportedAdapterError

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


def test_weighted_adapter(build, sites_of):
    """PEFT gives a combination a rank that its configuration may not say for each module."""
    model = wrapped(
        build("llama"),
        {"r": 2, "target_modules": ["q_proj"]},
        {"r": 3, "target_modules": ["q_proj"]},
    )
    model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "mix", combination_type="cat")
    model.set_adapter("mix")
    expected = model.base_model.model.model.layers[0].self_attn.q_proj.get_delta_weight("mix")
    taken = take_over(model)
    assert taken.active == ("mix",)
    base = taken.base
    adapter = read_adapter(taken.adapters["mix"], "mix", sites_of(base), model=base)
    a, b, scale, *_ = adapter.weights["model.layers.0.self_attn.q_proj"]
    torch.testing.assert_close(scale * (b @ a), expected)


def test_unwrapped_peft_model_refuses_adapters_and_restore_gives_them_back(build):
    model = wrapped(build("llama"), {"r": 2, "target_modules": ["q_proj", "embed_tokens"]})
    before = logits(model, adapter_names=["a", "__base__"])
    saved = set(model.state_dict())
    taken = take_over(model)
    assert not hasattr(taken.base, "peft_config")
    with pytest.raises(CaptureError, match="lorafx took over the adapters"):
        logits(model, adapter_names=["a", "__base__"])
    taken.restore()
    assert set(model.state_dict()) == saved
    assert torch.equal(logits(model, adapter_names=["a", "__base__"]), before)
    assert taken.base.peft_config is model.peft_config


def test_active_adapter(build):
    configs = [{"r": 2, "target_modules": ["q_proj"]}, {"r": 2, "target_modules": ["v_proj"]}]
    model = wrapped(build("llama"), *configs)
    model.set_adapter("b")
    taken = take_over(model)
    assert taken.active == ("b",)
    taken.restore()
    with model.disable_adapter():
        assert take_over(model).active == ()


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


def test_other_models_are_refused(build):
    with pytest.raises(CheckpointError, match=r"is not a peft\.PeftModel"):
        take_over(build("plain"))
