"""Adapters that were trained on a part of what their target_modules match: W stays W elsewhere."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import oracle
import peft
import pytest
import torch
import transformers
from dense_merge import Case, check_mixed, error, random_base
from expert_files import PATH, Model, pair, read
from hand_made import factors, save
from packed_models import twins
from tiny import randomise
from tiny_models import VOCAB, token_inputs
from torch import nn

import lorafx
from lorafx.errors import CheckpointError, LorafxWarning

pytestmark = pytest.mark.usefixtures("fixed_sizes")

REFERENCE = {"lowering": "reference"}
TARGETS = ["q_proj", "v_proj", "down_proj"]


def partly(base: nn.Module, folder: Path, paths: Sequence[str], **config: Any) -> Path:
    """An adapter with factors at `paths` whose configuration targets every `TARGETS`."""
    oracle.save_adapter(base, folder, rank=3, targets=paths)
    file = folder / "adapter_config.json"
    settings = {**json.loads(file.read_text()), "target_modules": TARGETS, **config}
    file.write_text(json.dumps(settings))
    return folder


def under(base: nn.Module, prefix: str) -> list[str]:
    return [
        path
        for path, _ in base.named_modules()
        if path.startswith(prefix) and path.endswith(tuple(TARGETS))
    ]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A Llama with one adapter of its last layer and one of both layers."""
    base = random_base("llama")
    folder = tmp_path_factory.mktemp("partial")
    return Case(
        base,
        {
            "last": partly(base, folder / "last", under(base, "model.layers.1.")),
            "all": partly(base, folder / "all", under(base, "model.")),
        },
    )


def llava() -> nn.Module:
    """A language model with a vision tower; both have q_proj and v_proj."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    text = transformers.LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCAB
    )
    vision = transformers.CLIPVisionConfig(
        **sizes, num_attention_heads=4, image_size=16, patch_size=8, projection_dim=24
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=VOCAB - 1
    )
    model = transformers.LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    randomise(model)
    return model


def test_the_language_part_of_a_model_with_a_vision_tower(tmp_path: Path) -> None:
    base = llava()
    language = under(base, "model.language_model.")
    case = Case(base, {"text": partly(base, tmp_path / "text", language)})
    with pytest.warns(LorafxWarning, match=r"no factors for 4 of them \(40 %\)") as caught:
        cm = case.compile()
    (warning,) = [w for w in caught if w.category is LorafxWarning]
    assert "targets 10 modules here" in str(warning.message)
    assert "model.vision_tower.encoder.layers.0.self_attn.v_proj" in str(warning.message)
    assert [site.path for site in cm.sites] == language
    check_mixed(cm, case, ["text", None, "text"], token_inputs(3, 5))


def test_a_mixed_batch_of_a_part_and_the_whole(case: Case) -> None:
    with pytest.warns(LorafxWarning, match=r"'last' .* for 3 of them \(50 %\): model.layers.0"):
        cm = case.compile()
    inputs = token_inputs(4, 6)
    check_mixed(cm, case, ["last", "all", None, "last"], inputs)
    cm.merge("last")
    merged = cm(**inputs)["logits"]
    assert error(merged, case.expected(["last"] * 4, inputs)) <= oracle.TOLERANCE


@pytest.mark.parametrize(
    "config",
    [{"target_modules": r".*layers\.1\..*_proj"}, {"exclude_modules": r".*layers\.0\..*"}],
)
def test_modules_that_are_not_selected_do_not_count(case: Case, config: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", LorafxWarning)
        compile_last(case, **config)


def test_selected_modules_alone_count(case: Case) -> None:
    config = {"target_modules": TARGETS, "exclude_modules": ["layers.0.self_attn.q_proj"]}
    with pytest.warns(LorafxWarning, match=r"2 of them \(40 %\): model.layers.0.self_attn.v_proj"):
        compile_last(case, **config)


def compile_last(case: Case, **config: Any) -> Any:
    adapters = {"last": case.folders["last"]}
    lora_config = lorafx.LoraConfig(**config)
    return lorafx.compile(case.model(), lora_config, adapters=adapters, options=REFERENCE)


def test_strict_when_compiling(case: Case) -> None:
    message = r"no factors for 3 of them \(50 %\): model.layers.0.self_attn.q_proj.*strict=True"
    for strict in (lorafx.compile, lorafx.attach):
        model = case.model()
        with pytest.raises(CheckpointError, match=message):
            strict(model, case.folders, options={**REFERENCE, "strict": True})
        assert not any(module._forward_hooks for module in model.modules())
    lorafx.compile(
        case.model(), {"all": case.folders["all"]}, options={**REFERENCE, "strict": True}
    )


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("attached", [False, True])
def test_strict_when_loading(case: Case, attached: bool, strict: bool) -> None:
    config = lorafx.LoraConfig(target_modules=TARGETS)
    make = lorafx.attach if attached else lorafx.compile
    served = make(case.model(), config, options={**REFERENCE, "strict": strict})
    load = partial(lorafx.load_adapter, served) if attached else served.load_adapter
    with pytest.raises(CheckpointError, match="no factors for 3 of them"):
        load(case.folders["last"], "last", **({} if strict else {"strict": True}))
    with pytest.warns(LorafxWarning, match="no factors for 3 of them"):
        load(case.folders["last"], "last", **({"strict": False} if strict else {}))


def test_a_warning_made_an_error_changes_nothing(case: Case) -> None:
    cm = lorafx.compile(case.model(), lorafx.LoraConfig(target_modules=TARGETS), options=REFERENCE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(LorafxWarning):
            cm.load_adapter(case.folders["last"], "last")
    assert cm.adapters == ()


def test_a_peft_model_that_lacks_nothing_is_taken_over_without_a_word(case: Case) -> None:
    """PEFT gives what its file lacked factors of its own, with B = 0."""
    pm = peft.PeftModel.from_pretrained(case.model(), case.folders["last"], adapter_name="last")
    with warnings.catch_warnings():
        warnings.simplefilter("error", LorafxWarning)
        cm = lorafx.compile(pm.eval(), options=REFERENCE)
    check_mixed(cm, case, ["last", None], token_inputs(2, 5))


def test_an_adapter_of_one_projection_of_a_packed_one(tmp_path: Path) -> None:
    apart, packed = twins()
    pairs = factors(apart, ["layers.1.q_proj"], rank=2, seed=0)
    for targets, counted in (
        (["q_proj"], r"1 of them \(50 %\): layers.0.q_proj\. "),
        (["q_proj", "k_proj"], r"3 of them \(75 %\): layers.1.k_proj, layers.0.q_proj, "),
        (r".*\.(qkv|q|k)_proj", r"of them"),
    ):
        folder = save(apart, tmp_path / "q", pairs, target_modules=targets)
        with pytest.warns(LorafxWarning, match=counted):
            lorafx.compile(packed, {"q": folder}, options=REFERENCE).detach()
    config = lorafx.LoraConfig(target_modules=["layers.1.q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", LorafxWarning)
        cm = lorafx.compile(packed, config, adapters={"q": folder}, options=REFERENCE)
    assert [site.path for site in cm.sites] == ["layers.1.qkv_proj"]


def test_a_packed_adapter_on_projections_that_are_apart(tmp_path: Path) -> None:
    apart, packed = twins()
    apart.packed_modules_mapping = packed.packed_modules_mapping
    pairs = factors(packed, ["layers.1.qkv_proj"], rank=2, seed=0)
    folder = save(packed, tmp_path / "qkv", pairs, target_modules=["qkv_proj"])
    with pytest.warns(LorafxWarning, match=r"1 of them \(50 %\): layers.0.qkv_proj\. "):
        lorafx.compile(apart, {"qkv": folder}, options=REFERENCE)


def test_names_whose_rows_say_their_slices(tmp_path: Path) -> None:
    apart, packed = twins()
    packed.packed_modules_mapping = {"in_proj_qkvz": ["in_proj_qkv", "in_proj_z"]}
    pairs = factors(apart, ["layers.1.in_proj_z"], rank=2, seed=0)
    targets = ["in_proj_qkv", "in_proj_z"]
    folder = save(apart, tmp_path / "z", pairs, target_modules=targets)
    config = lorafx.LoraConfig(target_modules=["layers.1.in_proj_qkvz"])
    with pytest.warns(LorafxWarning, match=r"1 of them \(50 %\): layers.1.in_proj_qkv\. "):
        lorafx.compile(packed, config, adapters={"z": folder}, options=REFERENCE)


def test_single_experts_by_their_older_names() -> None:
    """Expert 1 of 3 has gate and up; what is left is 4 of those 6 and all of w2."""
    tensors = {
        **pair((2, 5), (4, 2), f"{PATH}.1.w1"),
        **pair((2, 5), (4, 2), f"{PATH}.1.w3", seed=2),
    }
    with pytest.warns(LorafxWarning, match=r"7 of them \(78 %\): block.experts.0.w1, .*\.2.w2"):
        adapter = read(Model(), tensors, target_modules=["w1", "w2", "w3"])
    with pytest.warns(LorafxWarning, match="7 of them"):
        read(Model(), tensors, target_modules=rf"{PATH}\.\d.(w.|.*_proj)")
    assert adapter.weights[f"{PATH}.gate_up_proj[0]"].ranks.tolist() == [0, 2, 0]
