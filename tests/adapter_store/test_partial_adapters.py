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
from dense_merge import REFERENCE, Case, check_mixed, error, random_base
from llava import llava
from tiny_models import token_inputs
from torch import nn

import lorafx
from lorafx.errors import CheckpointError, LorafxWarning

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
    base = random_base("llama", num_hidden_layers=2)
    folder = tmp_path_factory.mktemp("partial")
    return Case(
        base,
        {
            "last": partly(base, folder / "last", under(base, "model.layers.1.")),
            "all": partly(base, folder / "all", under(base, "model.")),
        },
    )


@pytest.mark.usefixtures("in_eager_mode")
def test_the_language_part_of_a_model_with_a_vision_tower(tmp_path: Path) -> None:
    base = llava(random_base("llama", num_hidden_layers=2), 24)
    language = under(base, "model.language_model.")
    case = Case(base, {"text": partly(base, tmp_path / "text", language)})
    with pytest.warns(LorafxWarning, match=r"no factors for 4 of them \(40 %\)") as caught:
        cm = case.compile()
    (warning,) = [w for w in caught if w.category is LorafxWarning]
    assert "targets 10 modules here" in str(warning.message)
    assert "model.vision_tower.encoder.layers.0.self_attn.v_proj" in str(warning.message)
    assert [site.path for site in cm.sites] == language
    check_mixed(cm, case, ["text", None, "text"], token_inputs(3, 5))


def test_a_mixed_batch_of_a_part_and_the_whole(in_eager_mode: None, case: Case) -> None:
    with pytest.warns(LorafxWarning, match=r"'last' .* for 3 of them \(50 %\): model.layers.0"):
        cm = case.compile()
    inputs = token_inputs(4, 6)
    check_mixed(cm, case, ["last", "all", None, "last"], inputs)
    cm.merge("last")
    merged = cm(**inputs)["logits"]
    assert error(merged, case.expected(["last"] * 4, inputs)) <= oracle.TOLERANCE


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


@pytest.mark.parametrize(("attached", "strict"), [(False, True), (True, False)])
def test_strict_when_loading(case: Case, attached: bool, strict: bool) -> None:
    config = lorafx.LoraConfig(target_modules=TARGETS)
    make = lorafx.attach if attached else lorafx.compile
    served = make(case.model(), config, options={**REFERENCE, "strict": strict})
    load = partial(lorafx.load_adapter, served) if attached else served.load_adapter
    with pytest.raises(CheckpointError, match="no factors for 3 of them"):
        load(case.folders["last"], "last", **({} if strict else {"strict": True}))
    with pytest.warns(LorafxWarning, match="no factors for 3 of them"):
        load(case.folders["last"], "last", **({"strict": False} if strict else {}))


@pytest.mark.usefixtures("in_eager_mode")
def test_a_peft_model_that_lacks_nothing_is_taken_over_without_a_word(case: Case) -> None:
    """PEFT gives what its file lacked factors of its own, with B = 0."""
    pm = peft.PeftModel.from_pretrained(case.model(), case.folders["last"], adapter_name="last")
    with warnings.catch_warnings():
        warnings.simplefilter("error", LorafxWarning)
        cm = lorafx.compile(pm.eval(), options=REFERENCE)
    check_mixed(cm, case, ["last", None], token_inputs(2, 5))
