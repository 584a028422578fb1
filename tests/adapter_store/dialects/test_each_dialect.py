"""What each dialect says in its own way, and what lands nowhere, which is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import Case, save_adapter
from dialect_files import Tree, alpha, as_diffusers, as_kohya, as_loralib, as_mlx, factors
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


def test_kohya_names_that_two_modules_have() -> None:
    model = Tree(["a.b", "a_b", "a_c"])
    tensors = {"lora_unet_a_b.lora_down.weight": torch.ones(1, 3)}
    tensors["lora_unet_a_b.lora_up.weight"] = torch.ones(4, 1)
    with pytest.raises(CheckpointError, match=r"lora_unet_a_b may be a\.b or a_b"):
        load_state(tensors, model)


def test_kohya_factors_of_1x1_convolutions_and_linears() -> None:
    """One implementation's 1×1 convolution is the other's linear."""
    model = nn.ModuleDict({"linear": nn.Linear(3, 4), "conv": nn.Conv2d(3, 4, 1)})
    a, b = torch.ones(2, 3), torch.ones(4, 2)
    tensors = {
        "lora_unet_linear.lora_down.weight": a[..., None, None],
        "lora_unet_linear.lora_up.weight": b[..., None, None],
        "lora_unet_conv.lora_down.weight": a,
        "lora_unet_conv.lora_up.weight": b,
    }
    shapes = {key: tensor.shape for key, tensor in load_state(tensors, model).tensors.items()}
    assert shapes == {
        "linear.lora_A.weight": (2, 3),
        "linear.lora_B.weight": (4, 2),
        "conv.lora_A.weight": (2, 3, 1, 1),
        "conv.lora_B.weight": (4, 2, 1, 1),
    }


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_a_model_that_holds_the_models_of_a_pipeline(dialect: str) -> None:
    """All components are placed, and none is left out."""
    parts = {"unet": {"a": nn.Linear(3, 4)}, "text_encoder": {"a": nn.Linear(5, 4)}}
    model = nn.ModuleDict({name: nn.ModuleDict(own) for name, own in parts.items()})
    starts = {"kohya": ("lora_unet_a", "lora_te1_a"), "diffusers": ("unet.a", "text_encoder.a")}
    ends = {"kohya": ("lora_down", "lora_up"), "diffusers": ("lora.down", "lora.up")}[dialect]
    tensors = {}
    for start, size in zip(starts[dialect], (3, 5), strict=True):
        tensors[f"{start}.{ends[0]}.weight"] = torch.ones(2, size)
        tensors[f"{start}.{ends[1]}.weight"] = torch.ones(4, 2)
        tensors[f"{start}.alpha"] = torch.tensor(1.0)
    state = load_state(tensors, model)
    assert state.left_out == ()
    assert state.scales == {"unet.a": 0.5, "text_encoder.a": 0.5}
    assert {key: t.shape[1] for key, t in state.tensors.items() if "lora_A" in key} == {
        "unet.a.lora_A.weight": 3,
        "text_encoder.a.lora_A.weight": 5,
    }


def test_kohya_refuses_scales_of_inputs_and_stray_keys(case: Case, tmp_path: Path) -> None:
    file = as_kohya(case.folders["kohya"], tmp_path / "a.safetensors")
    tensors = load_file(file)
    name = next(iter(tensors)).partition(".")[0]
    with pytest.raises(UnsupportedAdapterError, match="a scale for each input"):
        load_state({**tensors, f"{name}.dora_scale": torch.ones(1, 24)}, case.base)
    with pytest.raises(CheckpointError, match=r"keys that are not kohya's.*'stray.key'"):
        load_state({**tensors, "stray.key": torch.ones(1)}, case.base)


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


def test_loralib_without_alpha(case: Case, tmp_path: Path) -> None:
    file = as_loralib(case.folders["loralib"], tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="do not say α; give"):
        load_state(file, case.base)


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


@pytest.mark.parametrize("sizes", [((4, 8), (0, 2)), ((4, 8), (1, 2)), ((3000, 8), (3000, 1))])
def test_loralib_slices_that_make_no_matrix(sizes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    """No rows, fewer rows than slices, or far more zeros than the model has numbers."""
    a, b = (torch.zeros(own) for own in sizes)
    model = torch.nn.Sequential(torch.nn.Linear(8, 3000))
    tensors = {"0.lora_A": a, "0.lora_B": b}
    asked = lorafx.AdapterSource(tensors, config={"lora_alpha": 1})
    for of in (None, model):
        with pytest.raises(CheckpointError, match=r"0 (has factors of|would be far larger)"):
            load_state(asked, of)


@pytest.mark.parametrize("alpha", [torch.tensor(2.0).to(torch.float8_e4m3fn), torch.tensor(2)])
@pytest.mark.parametrize("down", ["lora_unet_0.lora_down.weight", "unet.0.lora.down.weight"])
def test_alpha_in_any_dtype(down: str, alpha: torch.Tensor) -> None:
    start = down.partition(".lora")[0]
    up = down.replace("down", "up")
    tensors = {down: torch.ones(4, 8), up: torch.ones(8, 4), f"{start}.alpha": alpha}
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    assert load_state(lorafx.AdapterSource(tensors), model).scales == {"0": 0.5}
    for wrong in (torch.tensor(2j), torch.tensor(float("nan")), torch.ones(2)):
        tensors[f"{start}.alpha"] = wrong
        with pytest.raises(CheckpointError, match="alpha must be one finite number"):
            load_state(lorafx.AdapterSource(tensors), model)


def test_mlx_refuses_whole_weights_and_wants_its_scale(case: Case, tmp_path: Path) -> None:
    folder = as_mlx(case.folders["mlx"], tmp_path / "mlx")
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora"', '"full"'))
    with pytest.raises(UnsupportedAdapterError, match="trains whole weights; fuse it"):
        load_state(folder, case.base)
    config.unlink()
    with pytest.raises(CheckpointError, match="has no lora_parameters"):
        load_state(folder, case.base)


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


def test_a_name_that_is_a_child_of_the_model_needs_a_configuration(tmp_path: Path) -> None:
    model = nn.ModuleDict({"transformer": nn.ModuleDict({"q": nn.Linear(3, 3)})})
    tensors = {
        "transformer.q.lora_A.weight": torch.ones(1, 3),
        "transformer.q.lora_B.weight": torch.ones(3, 1),
    }
    with pytest.raises(CheckpointError, match="'transformer' is a module of this model"):
        load_state(tensors, model)
    state = load_state(lorafx.AdapterSource(tensors, config={"r": 1, "lora_alpha": 1}), model)
    assert state.dialect == "peft"


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


def test_modules_with_names_like_glora_s_parts() -> None:
    model = nn.ModuleDict({"a1": nn.Linear(3, 2), "a2": nn.Linear(2, 3)})
    factors = {"lora_A": torch.ones(1, 3), "lora_B": torch.ones(2, 1)}
    tensors = {f"a1.{name}": value for name, value in factors.items()}
    saved = {"a1.weight": model["a1"].weight, "a2.weight": model["a2"].weight}
    state = load_state(lorafx.AdapterSource(tensors | saved, {"lora_alpha": 1}), model)
    assert {"a1.lora_A.weight", "a1.lora_B.weight", "a1.weight"} <= set(state.tensors)
    glora = {f"lora_unet_a.{part}.weight": torch.ones(2, 2) for part in ("a1", "a2", "b1", "b2")}
    with pytest.raises(UnsupportedAdapterError, match=r"GLoRA: 4 keys"):
        load_state(glora, model)


def test_older_keys_of_diffusers(case: Case, tmp_path: Path) -> None:
    model = nn.ModuleDict({"attn1": nn.ModuleDict({"to_q": nn.Linear(3, 3)})})
    tensors = {
        "unet.attn1.processor.to_q_lora.down.weight": torch.ones(1, 3),
        "unet.attn1.processor.to_q_lora.up.weight": torch.ones(3, 1),
    }
    state = load_state(tensors, model)
    assert set(state.tensors) == {"attn1.to_q.lora_A.weight", "attn1.to_q.lora_B.weight"}
    assert state.scales == {"attn1.to_q": 1.0}


def test_diffusers_of_another_model(case: Case, tmp_path: Path) -> None:
    file = as_diffusers(case.folders["diffusers"], tmp_path / "a.safetensors", "text_encoder")
    text = load_file(file)
    unet = {k.replace("text_encoder.model.layers", "unet.other.blocks"): t for k, t in text.items()}
    with pytest.warns(LorafxWarning, match=r"other models of a pipeline too \(unet\)"):
        load_state({**text, **unet}, case.base)
    other = {
        k.replace("text_encoder.model.layers", "transformer.other.blocks"): t
        for k, t in text.items()
    }
    with pytest.raises(CheckpointError, match="made for another model"):
        load_state({**unet, **other}, case.base)
