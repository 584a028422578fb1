"""Every tensor of a file that diffusers converts arrives, or is named."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor, nn

import lorafx
from lorafx.adapter_store.peft_reader import Adapter, read_adapter
from lorafx.config import LoraConfig
from lorafx.errors import CheckpointError
from lorafx.integrations.diffusers.components import loadable, parts_of
from lorafx.runtime.marking import build_sites

CLIP = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
T5 = "lora_te2_encoder_block_0_layer_0_SelfAttention_q"
FLUX = "lora_unet_double_blocks_0_img_attn_proj"


def pair(name: str, k: int, n: int) -> dict[str, Tensor]:
    found = {f"{name}.lora_down.weight": torch.randn(2, k)}
    found[f"{name}.lora_up.weight"] = torch.randn(n, 2)
    return found | {f"{name}.alpha": torch.tensor(1.0)}


def read(model: nn.Module, source: Any, strict: bool = False) -> Adapter:
    _, sites = build_sites(model, LoraConfig(target_modules="all-linear"))
    return read_adapter(source, "a", sites, model=model, strict=strict)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.pipeline("flux")


@pytest.fixture
def file() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {**pair(FLUX, 16, 16), **pair(CLIP, 8, 8), **pair(T5, 16, 8)}


def test_a_transformer_alone_names_the_encoders_that_have_parts(pipe: Any, file: Any) -> None:
    with pytest.warns(lorafx.LorafxWarning, match=r"too \(text_encoder, text_encoder_2\)"):
        adapter = read(pipe.transformer, file)
    assert adapter.weights.keys() == {"transformer_blocks.0.attn.to_out.0"}
    with pytest.raises(CheckpointError, match=r"too \(text_encoder, text_encoder_2\).* an error"):
        read(pipe.transformer, file, strict=True)
    chosen = lorafx.AdapterSource(file, component="unet")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(pipe.transformer, chosen, strict=True).weights.keys() == adapter.weights.keys()


@pytest.mark.filterwarnings("error")
def test_a_pipeline_gives_each_model_its_part_and_changes_no_tensor(pipe: Any, file: Any) -> None:
    """diffusers scales the factors of an encoder in place."""
    before = {key: tensor.clone() for key, tensor in file.items()}
    models = loadable(pipe, ["transformer", "text_encoder", "text_encoder_2"])
    parts = parts_of(file, pipe, models)
    for component, part in parts.items():
        name = {"transformer": FLUX, "text_encoder": CLIP, "text_encoder_2": T5}[component]
        (weights,) = read(models[component], part, strict=True).weights.values()
        want = 0.5 * before[f"{name}.lora_up.weight"] @ before[f"{name}.lora_down.weight"]
        torch.testing.assert_close(weights.scale * weights.B @ weights.A, want)
    assert parts.keys() == models.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in file.items())


def test_what_a_conversion_leaves_out_is_named() -> None:
    """Two of three modules, of which diffusers only logs the names."""
    sizes = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}
    model = Flux2Transformer2DModel(
        in_channels=16,
        attention_head_dim=8,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        **sizes,
    )
    lost = ("lora_unet_guidance_in_in_layer", "lora_unet_single_stream_modulation_lin")
    file = {**pair(FLUX, 16, 16), **pair(lost[0], 16, 16), **pair(lost[1], 16, 16)}
    with pytest.warns(lorafx.LorafxWarning, match="leaves out 4 of its tensors") as warned:
        adapter = read(model, file)
    assert adapter.weights.keys() == {"transformer_blocks.0.attn.to_out.0"}
    messages = [str(w.message) for w in warned if w.category is lorafx.LorafxWarning]
    assert len(messages) == 1
    assert all(f"{name}.lora_{x}.weight" in messages[0] for name in lost for x in ("up", "down"))
    with pytest.raises(
        CheckpointError, match=r"lora_unet_guidance_in_in_layer\.lora_up.* an error"
    ):
        read(model, file, strict=True)


QKV = "lora_unet_double_blocks_0_txt_attn_qkv"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({f"{QKV}.diff": torch.ones(48, 16)}, "txt_attn_qkv.* all of a weight, .* splits"),
        (
            {f"{QKV}.lokr_w1": torch.ones(12, 4), f"{QKV}.lokr_w2": torch.ones(4, 4)},
            "txt_attn_qkv.* all of a weight, .* splits",
        ),
        ({f"{FLUX}.diff_b": torch.ones(16)}, "diffusers, where it is installed, has no conversion"),
    ],
)
def test_weights_and_biases_that_a_conversion_leaves_out_are_an_error(
    pipe: Any, more: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(pipe.transformer, {**pair(FLUX, 16, 16), **more})
