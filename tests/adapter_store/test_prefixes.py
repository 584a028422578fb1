"""Which prefixes of saved paths may be exchanged: those that transformers names for the same part.
Towers of one model, and models of one family, have layers of the same names and sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import tiny_pipelines
import torch
from dense_merge import random_base
from diffusers import QwenImageTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from llava import llava
from torch import Tensor, nn
from transformers import LlamaModel, SiglipConfig, SiglipModel, SiglipTextModel, SiglipVisionModel

import lorafx
from lorafx.adapter_store.peft_reader import read_adapter
from lorafx.config import LoraConfig
from lorafx.errors import CheckpointError, ConfigError, LorafxError
from lorafx.model.saved_names import WRAPPERS
from lorafx.runtime.marking import build_sites

pytestmark = pytest.mark.quick
CONFIG = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "to_q"]}
Q = "layers.0.self_attn.q_proj"
TO_Q = "transformer_blocks.0.attn.to_q"


def siglip_config(vision: int = 16) -> SiglipConfig:
    sizes = {"intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"hidden_size": 16, "vocab_size": 32, "max_position_embeddings": 8}
    tokens = {"bos_token_id": 0, "eos_token_id": 1}
    image = {"hidden_size": vision, "image_size": 8, "patch_size": 4}
    return SiglipConfig(text_config=sizes | text | tokens, vision_config=sizes | image)


def qwen_image() -> nn.Module:
    return QwenImageTransformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
    )


class Headed(nn.Module):
    """A user's own head on a text model."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = random_base("llama")
        self.head = nn.Linear(8, 3)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "text": lambda: random_base("llama"),
    "trunk": lambda: LlamaModel(random_base("llama").config),
    "images and text": lambda: llava(random_base("llama"), 20),
    "headed": Headed,
    "siglip": lambda: SiglipModel(siglip_config(24)),
    "siglip's text": lambda: SiglipTextModel(siglip_config().text_config),
    "siglip's images": lambda: SiglipVisionModel(siglip_config().vision_config),
    "flux": tiny_pipelines.flux_transformer,
    "qwen": qwen_image,
}
model_of = cache(lambda name: MODELS[name]())


def pair(path: str, size: int, ends: tuple[str, str] = ("lora_A", "lora_B")) -> dict[str, Tensor]:
    a, b = ends
    return {f"{path}.{a}.weight": torch.ones(2, size), f"{path}.{b}.weight": torch.ones(size, 2)}


def read(name: str, tensors: dict[str, Tensor], strict: bool = False, **source: Any) -> set[str]:
    """The modules that an adapter changes."""
    model = model_of(name)
    _, sites = build_sites(model, LoraConfig(target_modules="all-linear"))
    adapter = lorafx.AdapterSource(tensors, **source)
    return set(read_adapter(adapter, "a", sites, model=model, strict=strict).weights)


@pytest.mark.parametrize("start", ["", "base_model.model.", "module.", "_orig_mod."])
@pytest.mark.parametrize(
    ("saved", "name", "here"),
    [
        (f"model.{Q}", "text", f"model.{Q}"),
        (Q, "text", f"model.{Q}"),
        (f"model.{Q}", "trunk", Q),
        # A text model's, of the model that holds it, with and without a head; and back.
        (f"model.{Q}", "images and text", f"model.language_model.{Q}"),
        (Q, "images and text", f"model.language_model.{Q}"),
        (f"language_model.model.{Q}", "images and text", f"model.language_model.{Q}"),
        (f"model.language_model.{Q}", "text", f"model.{Q}"),
        (f"language_model.model.{Q}", "text", f"model.{Q}"),
        (f"model.language_model.{Q}", "trunk", Q),
        (f"model.text_model.{Q}", "text", f"model.{Q}"),
        # A model in a user's own.
        (f"model.{Q}", "headed", f"trunk.model.{Q}"),
        (Q, "headed", f"trunk.model.{Q}"),
        # What transformers 4 called the inner model.
        (f"text_model.encoder.{Q}", "siglip's text", f"encoder.{Q}"),
        (f"vision_model.encoder.{Q}", "siglip's images", f"encoder.{Q}"),
        (TO_Q, "qwen", TO_Q),
    ],
)
def test_prefixes_of_the_same_part(start: str, saved: str, name: str, here: str) -> None:
    size = model_of(name).get_submodule(here).in_features
    assert read(name, pair(start + saved, size), config=CONFIG) == {here}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("saved", "name", "here"),
    [
        (f"vision_model.encoder.{Q}", "siglip's text", f"encoder.{Q}"),
        (f"text_model.encoder.{Q}", "siglip's images", f"encoder.{Q}"),
        (f"encoder.{Q}", "siglip", f"text_model.encoder.{Q}"),
        (f"vision_tower.{Q}", "text", f"model.{Q}"),
        (f"model.vision_tower.{Q}", "trunk", Q),
        (f"audio_tower.{Q}", "images and text", f"model.language_model.{Q}"),
        (f"decoder.{Q}", "headed", f"trunk.model.{Q}"),
        (f"single_{TO_Q}", "qwen", TO_Q),
        (f"transformer.single_{TO_Q}", "qwen", TO_Q),
        (f"other.{TO_Q}", "flux", TO_Q),
    ],
)
def test_prefixes_of_another_part(strict: bool, saved: str, name: str, here: str) -> None:
    size = model_of(name).get_submodule(here).in_features
    end = saved.rpartition(".")[2]
    config = None if saved.startswith("transformer.") else CONFIG
    with pytest.raises(CheckpointError, match=rf"{end}.*{end}.*prefix=\(") as raised:
        read(name, pair(saved, size), strict, config=config)
    way = str(raised.value).rpartition("prefix=")[2]
    prefix = eval(way[: way.index(")") + 1])
    assert read(name, pair(saved, size), config=config, prefix=prefix) == {here}


def test_names_with_underscores_of_another_part() -> None:
    """kohya's, which a shorter name in the model ends; and those that diffusers converts."""
    ends = ("lora_down", "lora_up")
    with pytest.raises(CheckpointError, match="prefix="):
        read("qwen", pair("lora_unet_single_transformer_blocks_0_attn_to_q", 16, ends))
    flux = pair("lora_unet_double_blocks_0_img_attn_proj", 16, ends)
    assert read("flux", flux) == {"transformer_blocks.0.attn.to_out.0"}
    with pytest.raises(CheckpointError, match="no conversion"):
        read("qwen", flux)


def test_a_prefix_that_is_taken_off() -> None:
    tensors = pair(f"model.vision_tower.encoder.{Q}", 16)
    prefix = "model.vision_tower"
    assert read("siglip's images", tensors, config=CONFIG, prefix=prefix) == {f"encoder.{Q}"}


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        (7, "prefix is the path in the files"),
        (("a",), "prefix is"),
        ("b", "prefix matches no path"),
    ],
)
def test_prefixes_that_are_wrong(prefix: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read("text", pair(f"model.{Q}", 8), config=CONFIG, prefix=prefix)


NAMES = st.sampled_from(["a", "b", "0", "1", "layers", "model", "text_model", "language_model"])
PATHS = st.lists(NAMES, min_size=1, max_size=4)
START = st.sampled_from([*sorted(WRAPPERS), "base_model.model", "a", "model"])


@settings(max_examples=150)
@given(
    st.lists(PATHS, min_size=1, max_size=3),
    st.lists(START, max_size=2),
    st.integers(0, 2),
    st.integers(0, 2),
)
def test_a_file_of_any_tree_loads_where_its_paths_are(paths, start, cut, index) -> None:
    """Without transformers' names only those of wrappers may come or go."""
    model = nn.Module()
    for path in paths:
        module = model
        for name in path:
            if name not in module._modules:
                module.add_module(name, nn.Linear(4, 4))
            module = module.get_submodule(name)
    saved = ".".join([*start, *paths[index % len(paths)][cut:]])
    if not saved:
        return
    _, sites = build_sites(model, LoraConfig(target_modules="all-linear"))
    source = lorafx.AdapterSource(pair(saved, 4), config={"r": 2, "lora_alpha": 2})
    try:
        (loaded,) = read_adapter(source, "a", sites, model=model).weights
    except LorafxError:
        return
    plain = ".".join(name for name in saved.split(".") if name not in WRAPPERS)
    while plain.startswith("base_model.model."):
        plain = plain.removeprefix("base_model.model.")
    assert plain == loaded
