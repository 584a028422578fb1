"""What each dialect says in its own way, and what lands nowhere, which is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import Case, save_adapter
from dialect_files import alpha, as_kohya, factors
from expert_files import Model as ExpertModel
from safetensors.torch import load_file, save_file
from torch import nn

import lorafx
from lorafx.adapter_store.checkpoint import load_state
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.peft_reader import read_adapter
from lorafx.config import LoraConfig
from lorafx.errors import CheckpointError, LorafxWarning, UnsupportedAdapterError
from lorafx.prepare.marking import build_sites

pytestmark = [pytest.mark.quick, pytest.mark.filterwarnings("ignore")]


def test_kohya_of_two_components(case: Case, tmp_path: Path) -> None:
    folder = case.folders["kohya"]
    unet = load_file(as_kohya(folder, tmp_path / "unet.safetensors"))
    text = {
        k.replace("lora_unet_", "lora_te_").replace("model", "other"): t for k, t in unet.items()
    }
    with pytest.warns(LorafxWarning, match=r"other models of a pipeline too \(text_encoder\)"):
        state = load_state({**unet, **text}, case.base)
    assert len(state.tensors) == sum("alpha" not in key for key in unet)
    both = {**unet, **{k.replace("lora_unet_", "lora_te_"): t for k, t in unet.items()}}
    with pytest.raises(CheckpointError, match="both fit this model; say which"):
        load_state(both, case.base)
    chosen = load_state(lorafx.AdapterSource(both, component="text_encoder"), case.base)
    assert chosen.tensors.keys() == state.tensors.keys()


def test_diffusers_configuration_in_the_metadata(case: Case, tmp_path: Path) -> None:
    folder = case.folders["diffusers"]
    tensors = {f"unet.{m}.lora_{x}.weight": t for m, x, t in factors(folder)}
    own = {"unet.r": 4, "unet.lora_alpha": 9, "unet.peft_type": "LORA"}
    first = next(iter(factors(folder)))[2]
    own["unet.r"] = min(first.shape)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(own)})
    state = load_state(tmp_path, case.base)
    assert state.config == PeftConfig(r=own["unet.r"], lora_alpha=9)
    save_file(tensors, file)
    assert set(load_state(file, case.base).scales.values()) == {1.0}


def test_a_file_of_peft_without_its_configuration(case: Case) -> None:
    file = case.folders["peft"] / "adapter_model.safetensors"
    with pytest.raises(CheckpointError, match="without α"):
        load_state(load_file(file), case.base)
    # Beside its configuration the file is as good as the folder.
    assert load_state(file, case.base).config.lora_alpha == alpha(case.folders["peft"])


def test_loralib_merged_linear(tmp_path: Path) -> None:
    """LoRA on the first and the last third of one linear, by groups."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12))
    a, b = torch.randn(4, 5), torch.randn(8, 2)
    grouped = torch.nn.functional.conv1d(a[None], b[..., None], groups=2)[0]  # as loralib merges
    want = torch.zeros(12, 5)
    want[:4], want[8:] = grouped[:4], grouped[4:]
    config = {"lora_alpha": 3, "enable_lora": [True, False, True]}
    tensors = {"0.lora_A": a, "0.lora_B": b}
    _, sites = build_sites(model, LoraConfig(target_modules=["0"]))
    found = read_adapter(lorafx.AdapterSource(tensors, config=config), "a", sites, model=model)
    weights = found.weights["0"]
    torch.testing.assert_close(weights.scale * weights.B @ weights.A, 3 / 2 * want)
    with pytest.raises(CheckpointError, match=r"needs config=.*enable_lora"):
        load_state(lorafx.AdapterSource(tensors, config={"lora_alpha": 3}), model)


def test_mlx_dora(case: Case, tmp_path: Path) -> None:
    folder = save_adapter(
        case.base, tmp_path / "dora", rank=2, targets=["q_proj"], use_dora=True, lora_alpha=3
    )
    tensors = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        path, _, factor = key.removeprefix("base_model.model.").partition(".lora_")
        name = {"A": "lora_a", "B": "lora_b"}.get(factor[0], "m")
        tensors[f"{path}.{name}"] = tensor if name == "m" else tensor.mT.contiguous()
    config = {"fine_tune_type": "dora", "lora_parameters": {"rank": 2, "scale": 1.5}}
    lora = LoraConfig(target_modules=["q_proj"], use_dora=True)
    check_equal(case.base, lora, lorafx.AdapterSource(tensors, config=config), folder)


def check_equal(model: nn.Module, config: LoraConfig, given: Any, expected: Any) -> None:
    _, sites = build_sites(model, config)
    got, want = (read_adapter(x, "a", sites, model=model).weights for x in (given, expected))
    assert got.keys() == want.keys() != set()
    for path, weights in want.items():
        for a, b in zip(got[path], weights, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_mlx_experts_are_those_of_their_names_one_by_one(tmp_path: Path) -> None:
    """switch_mlp holds the factors of all experts; older releases have A as (E·r, K)."""
    model = ExpertModel()
    model.block = nn.ModuleDict({"experts": model.block.experts})
    sizes = {"gate_proj": (4, 5), "up_proj": (4, 5), "down_proj": (5, 4)}
    stacked, single = {}, {}
    torch.manual_seed(0)
    for name, (rows, columns) in sizes.items():
        a, b = torch.randn(3, 2, columns), torch.randn(3, rows, 2)
        flat = a.reshape(6, columns) if name == "up_proj" else a
        path = f"block.switch_mlp.{name}.lora_"
        stacked |= {f"{path}a": flat, f"{path}b": b}
        for e in range(3):
            single[f"block.experts.{e}.{name}.lora_A.weight"] = a[e]
            single[f"block.experts.{e}.{name}.lora_B.weight"] = b[e]
    mlx = lorafx.AdapterSource(stacked, config={"lora_parameters": {"rank": 2, "scale": 3.0}})
    peft = lorafx.AdapterSource(single, config={"r": 2, "lora_alpha": 6})
    check_equal(model, LoraConfig(target_modules=["experts"]), mlx, peft)


@pytest.mark.parametrize(
    ("key", "method"),
    [
        ("lora_unet_a.hada_w1_a", "LoHa"),
        ("base_model.model.a.oft_r.weight", "OFT"),
        ("lora_unet_a.diff", "whole difference"),
        ("lora_unet_a.lora_mid.weight", "Tucker"),
    ],
)
def test_other_methods_are_refused_by_name(key: str, method: str, case: Case) -> None:
    with pytest.raises(UnsupportedAdapterError, match=method):
        load_state({key: torch.ones(2, 2)}, case.base)
