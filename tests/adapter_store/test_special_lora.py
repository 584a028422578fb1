"""LoRA in special forms: blocks on a diagonal, and initialisations that change the base weight."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from dense_merge import REFERENCE, Case, check_mixed, random_base
from safetensors.torch import load_file
from tiny_models import token_inputs
from torch import nn

import lorafx
from lorafx.adapter_store.checkpoint import load_state
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.errors import CheckpointError, UnsupportedAdapterError

pytestmark = [pytest.mark.quick, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return random_base("llama", num_hidden_layers=1)


def wrapped(base: nn.Module, **config) -> peft.PeftModel:
    torch.manual_seed(5)
    return peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))


@torch.no_grad()
def trained(model: peft.PeftModel) -> peft.PeftModel:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def test_blocks_on_a_diagonal(base: nn.Module, tmp_path: Path) -> None:
    """q and k have B in blocks, o and down A, and v has plain factors."""
    config = {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"],
        "use_bdlora": peft.tuners.lora.BdLoraConfig(
            target_modules_bd_a=["o_proj", "mlp.down"],
            target_modules_bd_b=["q_proj", "k_proj"],
            nblocks=2,
            match_strict=False,
        ),
        "rank_pattern": {"down_proj": 6},
    }
    trained(wrapped(base, r=4, lora_alpha=6, **config)).save_pretrained(tmp_path)
    shapes = {k: t.shape for k, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert any(shape[1] == 2 for shape in shapes.values())  # B (N, r / 2)
    case = Case(base, {"bd": tmp_path})
    cm = lorafx.compile(case.model(), case.folders, options=REFERENCE)
    check_mixed(cm, case, ["bd", None], token_inputs(2, 6))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (3, "must be an object"),
        ({"nblocks": 0}, "nblocks must be a positive integer"),
        ({"target_modules_bd_a": "q_proj"}, "parts of module paths in lists"),
        ({"blocks_of_tomorrow": 1}, "unknown field 'blocks_of_tomorrow'"),
    ],
)
def test_malformed_blocks(value: object, problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        PeftConfig.read({"use_bdlora": value})


def test_blocks_that_are_too_many_allocate_nothing(base: nn.Module) -> None:
    """A full matrix would have 10^12 entries; the reader says what is wrong with the shape."""
    path = "model.layers.0.self_attn.q_proj"
    tensors = {
        f"{path}.lora_A.weight": torch.ones(1_000_000, 1),
        f"{path}.lora_B.weight": torch.ones(24, 4),
    }
    settings = {"nblocks": 1_000_000, "target_modules_bd_a": ["q_proj"]}
    source = lorafx.AdapterSource(tensors, config={"r": 4, "use_bdlora": settings})
    assert load_state(source, base).tensors[f"{path}.lora_A.weight"].shape == (1_000_000, 1)
    with pytest.raises(CheckpointError, match=r"q_proj.lora_A.weight has shape \(1000000, 1\)"):
        lorafx.compile(copy.deepcopy(base), {"a": source}, options=REFERENCE)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_converted_initialisations_load_and_others_are_refused(
    init: str, base: nn.Module, tmp_path: Path
) -> None:
    model = wrapped(base, r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=init)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        want = copy.deepcopy(trained(model)).merge_and_unload().eval()
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(
        UnsupportedAdapterError, match=rf"(?i){init}.*path_initial_model_for_weight"
    ):
        load_state(tmp_path / "plain", base)
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "initial"
    )
    case = Case(base, {"a": tmp_path / "converted"}, {"a": want})
    cm = lorafx.compile(case.model(), case.folders, options=REFERENCE)
    check_mixed(cm, case, ["a", None], token_inputs(2, 5))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("IA3", "scales activations.*merge_and_unload"),
        ("VERA", "random matrices that all modules share"),
        ("LOHA", "element by element"),
        ("LOKR", "Kronecker"),
        ("OFT", "rotates the base weight"),
        ("XLORA", "a router of its own.*weights by name"),
        ("POLY", "a router of its own"),
        ("PREFIX_TUNING", "learns prompts"),
        ("METHOD_OF_TOMORROW", "only LORA adapters are read"),
    ],
)
def test_other_methods_are_refused_by_what_they_are(kind: str, message: str) -> None:
    with pytest.raises(UnsupportedAdapterError, match=f"peft_type = '{kind}': .*{message}"):
        PeftConfig.read({"peft_type": kind})
