"""Models that come with PEFT's adapters in them: taken over, given back, and no use in between."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from dense_merge import REFERENCE, check_mixed, error
from peft_in_transformers import needs_its_peft
from tiny_models import token_inputs

import lorafx
from lorafx.errors import CaptureError, CheckpointError, UnsupportedAdapterError

pytestmark = pytest.mark.usefixtures("in_eager_mode")

BATCH = {"input_ids": torch.arange(3, 15).reshape(2, 6)}


def wrapped(case: Any) -> peft.PeftModel:
    model = peft.PeftModel.from_pretrained(case.model(), str(case.folders["a1"]), "a1")
    model.load_adapter(str(case.folders["a0"]), "a0")
    return model.eval()


def injected(case: Any, *names: str) -> Any:
    """The base with these adapters, as transformers' own `load_adapter` puts them into it."""
    model = case.model()
    for name in names:
        model.load_adapter(str(case.folders[name]), name)
    return model.eval()


def answer(model: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCH, **kwargs)["logits"]


@pytest.fixture(scope="module")
def handed_over(llama: Any) -> tuple[peft.PeftModel, Any]:
    """A PeftModel, and what lorafx made of it. Uses that are refused change neither."""
    pm = wrapped(llama)
    return pm, lorafx.compile(pm, options={**REFERENCE, "start": "eager"})


@pytest.mark.parametrize(
    "use",
    [
        lambda pm: pm(**BATCH),
        lambda pm: pm.generate(**BATCH, max_new_tokens=2),
        lambda pm: pm.set_adapter("a0"),
        lambda pm: pm.load_adapter("somewhere", "other"),
        lambda pm: pm.merge_and_unload(),
        lambda pm: pm.save_pretrained("somewhere"),
        lambda pm: pm.state_dict(),
    ],
)
def test_a_peft_model_that_was_handed_over_says_so(llama, handed_over, use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pm, cm = handed_over
    with pytest.raises(
        CaptureError, match=r"PeftModel\w*\.\w+: .*lorafx took over the adapters.*detach"
    ):
        use(pm)
    assert not list(tmp_path.iterdir())
    assert isinstance(pm, peft.PeftModel)
    assert pm.get_base_model() is cm._orig_mod
    check_mixed(cm, llama, ["a0", None], BATCH)


@pytest.mark.parametrize("back", ["detach", "failed compile"])
def test_a_peft_model_that_was_given_back_is_what_it_was(llama, back):
    pm = wrapped(llama)
    pm.set_adapter("a0")
    before, own, names = answer(pm), set(vars(pm)), set(pm.state_dict())
    if back == "detach":
        lorafx.compile(pm, options=REFERENCE).detach()
    else:
        with pytest.raises(CheckpointError):
            lorafx.compile(pm, adapters={"c": "nowhere"}, options=REFERENCE)
    assert torch.equal(answer(pm), before)
    assert set(vars(pm)) == own
    assert set(pm.state_dict()) == names
    with pm.disable_adapter():
        assert torch.equal(answer(pm), answer(llama.base))
    pm.set_adapter("a1")
    assert error(answer(pm), llama.expected(["a1", "a1"], BATCH)) <= 1e-5
    pm.merge_and_unload()


@needs_its_peft
def test_adapters_that_transformers_injected_are_taken_over(llama):
    model = injected(llama, "a0", "a1")
    model.set_adapter("a0")
    before, inputs = answer(model), token_inputs(3, 5)
    cm = lorafx.compile(model, options=REFERENCE)
    assert cm.adapters == ("a0", "a1")
    assert cm._orig_mod is model
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert not model._hf_peft_config_loaded
    assert not hasattr(model, "peft_config")
    check_mixed(cm, llama, ["a1", None, "a0"], inputs)
    assert error(answer(cm), llama.expected(["a0", "a0"], BATCH)) <= 1e-5  # the active one
    cm.set_adapter(None)
    assert torch.equal(answer(cm), answer(llama.base))
    assert cm.detach() is model
    assert torch.equal(answer(model), before)
    assert model.active_adapters() == ["a0"]
    model.set_adapter("a1")
    assert error(answer(model), llama.expected(["a1", "a1"], BATCH)) <= 1e-5


@needs_its_peft
def test_several_active_adapters_are_a_sum(llama):
    model = injected(llama, "a0", "a1")
    model.set_adapter(["a0", "a1"])
    before = answer(model)
    cm = lorafx.compile(model, options=REFERENCE)
    assert error(answer(cm), before) <= 1e-5
    got = answer(cm, adapter_names=["a1", {"a0": 1.0, "a1": 1.0}])
    assert error(got[:1], llama.expected(["a1"], BATCH)) <= 1e-5
    assert error(got[1:], before[1:]) <= 1e-5
    cm.detach()
    assert torch.equal(answer(model), before)
    assert model.active_adapters() == ["a0", "a1"]


#: What transformers' `add_adapter` takes, beside q_proj and v_proj.
FEATURES = {
    "plain": {},
    "rslora": {"use_rslora": True, "rank_pattern": {"v_proj": 3}},
    "DoRA": {"use_dora": True},
    "biases": {"lora_bias": True},
    # The last: transformers' `set_adapter` fails where another one has no such weights.
    "own": {"modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": [3, 7]}},
}


@needs_its_peft
def test_adapters_that_were_trained_in_the_model_and_never_saved(llama):
    """Each by transformers' own methods; what they compute is compared while they are in it."""
    model = llama.model().train()
    alone = {}
    for name, feature in FEATURES.items():
        model.add_adapter(
            peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **feature), adapter_name=name
        )
        model.set_adapter(name)
        own = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(own, lr=0.05)
        for _ in range(3):
            optimiser.zero_grad()
            model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
            optimiser.step()
        alone[name] = answer(model.eval())
    model.disable_adapters()
    cm = lorafx.compile(model, options=REFERENCE)
    assert cm.adapters == tuple(FEATURES)
    base = answer(llama.base)
    for first, second in zip(FEATURES, [*list(FEATURES)[1:], None], strict=True):
        got = answer(cm, adapter_names=[first, second])
        want = torch.stack([alone[first][0], alone.get(second, base)[1]])
        assert error(got, want) <= 1e-5
        assert error(alone[first], base) > 1e-3
    assert error(answer(cm), base) <= 1e-6


def test_merged_adapters_and_other_layers_of_peft_are_refused_and_nothing_changes(llama, plain):
    pm = wrapped(llama)
    pm.merge_adapter()
    with pytest.raises(CheckpointError, match=r"a1 are merged .*unmerge_adapter"):
        lorafx.compile(pm, options=REFERENCE)
    model = peft.inject_adapter_in_model(peft.LoHaConfig(target_modules=["up"]), plain.model())
    names = set(dict(model.named_modules()))
    with pytest.raises(UnsupportedAdapterError, match=r"(?s)PlainModel's adapter .*LOHA"):
        lorafx.compile(model, options=REFERENCE)
    assert set(dict(model.named_modules())) == names


def test_scales_that_were_set_in_the_model_count(llama):
    pm = wrapped(llama)
    pm.base_model.model.model.layers[0].self_attn.q_proj.set_scale("a1", 0.5)
    before = answer(pm)
    assert error(answer(lorafx.compile(pm, options=REFERENCE)), before) <= 1e-5
    assert error(before, llama.expected(["a1", "a1"], BATCH)) > 1e-3


def test_adapters_of_a_part_of_the_model_are_refused(llama):
    outer = torch.nn.Sequential(wrapped(llama)).eval()
    with pytest.raises(
        CheckpointError, match=r"0\.base_model.*belong to a part of it; compile that part"
    ):
        lorafx.compile(outer, options=REFERENCE)


@pytest.mark.parametrize("how", ["load_adapter", "get_peft_model", "of the compiled model"])
def test_injection_after_compiling_is_refused(llama, how):
    """All rows would have that adapter, those of the base too."""
    cm = llama.compile()
    before = answer(cm)
    config = peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False)
    if how == "load_adapter":
        cm._orig_mod.load_adapter(str(llama.folders["a1"]), "x")
    else:
        peft.get_peft_model(cm if how == "of the compiled model" else cm._orig_mod, config, "x")
    for use in (answer, lambda m: answer(m, adapter_names=["a0", None]), lambda m: m.merge("a0")):
        with pytest.raises(CaptureError, match=r"PEFT has put adapters into this Llama.*load_"):
            use(cm)
    with pytest.raises(CaptureError, match="PEFT has put adapters"):
        cm.generate(**BATCH, max_new_tokens=1)
    again = lorafx.compile(cm.detach(), options=REFERENCE)
    assert again.adapters == ("x",)
    again.set_adapter(None)
    assert error(answer(again), before) <= 1e-6
