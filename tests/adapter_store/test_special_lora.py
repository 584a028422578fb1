"""LoRA in a special form: blocks on a diagonal."""

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


def test_blocks_on_a_diagonal(base, tmp_path: Path) -> None:
    case = Case(base, {"blocks": tmp_path}, {"blocks": blocks(base, tmp_path)})
    cm = lorafx.compile(case.model(), case.folders, options=REFERENCE)
    check_mixed(cm, case, ["blocks", None], token_inputs(2, 6))
