"""Adapters of diffusers' own models: what diffusers saves, and files that it converts."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import peft
import pytest
import tiny_pipelines
import torch
from dense_merge import REFERENCE, TOLERANCE, error
from diffusers import StableDiffusionPipeline
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

import lorafx
from lorafx.adapter_store.peft_reader import read_adapter
from lorafx.config import LoraConfig
from lorafx.runtime.marking import build_sites

pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = ["to_q", "to_v", "to_out.0", "conv1", "proj_in", "conv_shortcut"]
#: The first implementation's names of two of the UNet's modules.
SGM = {
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q": (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    ),
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_out_0": (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
    ),
}


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    torch.manual_seed(0)
    model = tiny_pipelines.unet(mid_block_type=None, cross_attention_dim=12)
    return model.eval().requires_grad_(False)


def inputs(rows: int) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "sample": torch.randn(rows, 4, 8, 8),
        "timestep": torch.arange(rows) * 7 + 1,
        "encoder_hidden_states": torch.randn(rows, 5, 12),
    }


@pytest.fixture(scope="module")
def saved(unet: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """What a pipeline and the model save of one adapter, and the model with it merged."""
    folder = tmp_path_factory.mktemp("diffusers")
    model = copy.deepcopy(unet)
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    settings = model.peft_config["default"].to_dict()
    factors = get_peft_model_state_dict(model)
    StableDiffusionPipeline.save_lora_weights(
        str(folder / "pipeline"), unet_lora_layers=factors, unet_lora_adapter_metadata=settings
    )
    model.save_lora_adapter(str(folder / "model"))
    model.fuse_lora()
    model.unload_lora()
    return folder, model


def as_kohya(folder: Path) -> dict[str, Tensor]:
    """The adapter as sd-scripts names it."""
    found = {}
    for key, tensor in load_file(folder / "model" / "pytorch_lora_weights.safetensors").items():
        path, _, factor = key.partition(".lora_")
        name = f"lora_unet_{path.replace('.', '_')}"
        found[f"{name}.lora_{'down' if factor[0] == 'A' else 'up'}.weight"] = tensor
        found[f"{name}.alpha"] = torch.tensor(3.0)
    return found


@pytest.mark.usefixtures("in_eager_mode")
def test_a_mixed_batch_of_what_diffusers_and_kohya_save(unet, saved, caplog) -> None:
    folder, merged = saved
    # Of the two modules alone, by the names that diffusers converts.
    torch.manual_seed(2)
    sgm, other = {}, copy.deepcopy(unet)
    lokr, kron = {}, copy.deepcopy(unet)
    for name, path in SGM.items():
        weight = other.get_submodule(path).weight
        a, b = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
        sgm |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
        sgm[f"{name}.alpha"] = torch.tensor(1.0)
        weight += 0.5 * b @ a
        w = {"lokr_w1": torch.randn(2, 4), "lokr_w2": torch.randn(4, weight.shape[1] // 4)}
        lokr |= {f"{name}.{leaf}": tensor for leaf, tensor in w.items()}
        kron.get_submodule(path).weight += torch.kron(*w.values())
    adapters = {
        "pipeline": folder / "pipeline",
        "model": folder / "model",
        "kohya": as_kohya(folder),
        "sgm": sgm,
        "lokr": lokr,
    }
    with caplog.at_level(logging.INFO, logger="lorafx"):
        cm = lorafx.compile(copy.deepcopy(unet), adapters, options=REFERENCE)
    names = [*adapters, None]
    own = {"sgm": other, "lokr": kron, None: unet}
    given = inputs(len(names))
    got = cm(**given, adapter_names=names).sample
    want = torch.cat(
        [
            own.get(name, merged)(**{key: t[row : row + 1] for key, t in given.items()}).sample
            for row, name in enumerate(names)
        ]
    )
    base = unet(**given).sample
    assert error(got, want) <= TOLERANCE
    assert all(error(want[row], base[row]) > 100 * TOLERANCE for row in range(len(adapters)))
    assert "converted by diffusers" in caplog.text


def test_a_text_encoder_that_has_lost_its_wrapper() -> None:
    """Files say `text_model`, which transformers 5 has no more; the UNet's factors are left out."""
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
    model = CLIPTextModel(CLIPTextConfig(**sizes, num_hidden_layers=2, vocab_size=20)).eval()
    tensors = {}
    for layer in (0, 1):
        path = f"text_model.encoder.layers.{layer}.self_attn.q_proj"
        own = [f"lora_te_{path.replace('.', '_')}.lora_{x}.weight" for x in ("down", "up")]
        tensors |= dict(zip(own, (torch.ones(2, 8), torch.ones(8, 2)), strict=True))
    unet = "lora_unet_mid_block_0_a"
    tensors |= {f"{unet}.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    _, sites = build_sites(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.warns(lorafx.LorafxWarning, match=r"a pipeline too \(unet\)"):
        adapter = read_adapter(tensors, "a", sites, model=model)
    assert adapter.weights.keys() == {f"encoder.layers.{n}.self_attn.q_proj" for n in (0, 1)}
    assert {weights.scale for weights in adapter.weights.values()} == {1.0}


def test_flux_by_the_names_of_its_first_implementation() -> None:
    """Its q, k and v are one module there: diffusers splits their B."""
    torch.manual_seed(0)
    model = tiny_pipelines.flux_transformer().eval()
    a, b = torch.randn(2, 16), torch.randn(48, 2)
    names = ["lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_0_img_attn_proj"]
    tensors = {
        f"{names[0]}.lora_down.weight": a,
        f"{names[0]}.lora_up.weight": b,
        f"{names[0]}.alpha": torch.tensor(1.0),
        f"{names[1]}.lora_down.weight": a,
        f"{names[1]}.lora_up.weight": b[:16],
        f"{names[1]}.alpha": torch.tensor(2.0),
    }
    _, sites = build_sites(model, LoraConfig(target_modules="all-linear"))
    adapter = read_adapter(tensors, "a", sites, model=model)
    attention = "transformer_blocks.0.attn"
    want = dict(zip("qkv", (0.5 * b @ a).split(16), strict=True))
    want = {f"{attention}.to_{name}": delta for name, delta in want.items()}
    want[f"{attention}.to_out.0"] = b[:16] @ a
    assert adapter.weights.keys() == want.keys()
    for path, weights in adapter.weights.items():
        torch.testing.assert_close(weights.scale * weights.B @ weights.A, want[path])
