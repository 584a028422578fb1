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
from lorafx.errors import UnsupportedAdapterError

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


def blocks(base: nn.Module, folder: Path) -> nn.Module:
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
    model = trained(wrapped(base, r=4, lora_alpha=6, **config))
    model.save_pretrained(folder)
    shapes = [t.shape for t in load_file(folder / "adapter_model.safetensors").values()]
    assert any(shape[1] == 2 for shape in shapes)  # B (N, r / 2)
    return model.merge_and_unload().eval()


def converted(init: str, base: nn.Module, folder: Path) -> nn.Module:
    """An initialisation that changes the base: refused as it is, converted by PEFT to `folder`."""
    plain, initial = folder.with_name(f"{init}-plain"), folder.with_name(f"{init}-initial")
    model = wrapped(base, r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=init)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(initial)
    model.peft_config["default"].init_lora_weights = init
    want = copy.deepcopy(trained(model)).merge_and_unload().eval()
    model.save_pretrained(plain)
    way_out = rf"(?i){init}.*path_initial_model_for_weight"
    with pytest.raises(UnsupportedAdapterError, match=way_out):
        load_state(plain, base)
    model.save_pretrained(folder, path_initial_model_for_weight_conversion=initial)
    return want


def test_blocks_on_a_diagonal_and_converted_initialisations(base, tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("blocks", "pissa", "olora")}
    merged = {"blocks": blocks(base, folders["blocks"])}
    merged |= {init: converted(init, base, folders[init]) for init in ("pissa", "olora")}
    case = Case(base, folders, merged)
    cm = lorafx.compile(case.model(), case.folders, options=REFERENCE)
    check_mixed(cm, case, [*folders, None], token_inputs(4, 6))
