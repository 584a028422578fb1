"""Any prefix before any spelling of a path, with any leaf: each factor arrives at its module with
its scale, or the file is refused by a message that names what is wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_pipelines
import torch
from dense_merge import random_base
from diffusers import WanTransformer3DModel
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

import lorafx
from lorafx.adapter_store.peft_reader import read_adapter
from lorafx.config import LoraConfig
from lorafx.errors import CheckpointError, ConfigError
from lorafx.runtime.marking import build_sites

pytestmark = [pytest.mark.quick, pytest.mark.filterwarnings("ignore")]


def wan() -> nn.Module:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=12,
        num_layers=2,
        rope_max_seq_len=16,
    )


class Given(NamedTuple):
    """A model, and modules of it by their names there and in its first implementation."""

    model: Callable[[], nn.Module]
    modules: Mapping[str, str]


_DOWN = "down_blocks.0.attentions.0.transformer_blocks.0"
_INPUT = "input_blocks.1.1.transformer_blocks.0"
_LETTERS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_ATTENTIONS = {"attn1": "self_attn", "attn2": "cross_attn"}
_FFN = {"net.0.proj": "0", "net.2": "2"}
MODELS = {
    "llama": Given(
        lambda: random_base("llama"),
        dict.fromkeys(
            [f"model.layers.0.{name}" for name in ("self_attn.q_proj", "mlp.down_proj")], ""
        ),
    ),
    "unet": Given(
        lambda: tiny_pipelines.unet(mid_block_type=None, cross_attention_dim=12),
        {f"{_DOWN}.{end}": f"{_INPUT}.{end}" for end in ("attn1.to_q", "attn2.to_out.0")},
    ),
    "flux": Given(
        tiny_pipelines.flux_transformer,
        {
            "transformer_blocks.0.attn.to_out.0": "double_blocks.0.img_attn.proj",
            "single_transformer_blocks.0.proj_out": "single_blocks.0.linear2",
        },
    ),
    "wan": Given(
        wan,
        {
            **{
                f"blocks.{i}.{a}.{path}": f"blocks.{i}.{b}.{letter}"
                for i in (0, 1)
                for a, b in _ATTENTIONS.items()
                for letter, path in _LETTERS.items()
            },
            **{
                f"blocks.{i}.ffn.{a}": f"blocks.{i}.ffn.{b}"
                for i in (0, 1)
                for a, b in _FFN.items()
            },
        },
    ),
}
PREFIXES = [
    *("", "base_model.model.", "model.", "diffusion_model.", "model.diffusion_model."),
    *("unet.", "transformer.", "lora_unet_", "lora_transformer_", "lycoris_"),
]
LEAVES = {
    "lora_A": ("lora_A.weight", "lora_B.weight"),
    "one name": ("lora_A.default.weight", "lora_B.default.weight"),
    "two names": ("lora_A.default_0.default.weight", "lora_B.default_0.default.weight"),
    "bare": ("lora_A", "lora_B"),
    "lora_down": ("lora_down.weight", "lora_up.weight"),
    "lora.down": ("lora.down.weight", "lora.up.weight"),
    "linear layer": ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    "torchtune": ("lora_a.weight", "lora_b.weight"),
}
SPELLINGS: Mapping[str, Callable[[str], str]] = {
    "dotted": lambda path: path,
    "underscored": lambda path: path.replace(".", "_"),
    "mixed": lambda path: path.replace(".", "_", 1),
}


def deltas(name: str, source: Any, strict: bool = False) -> dict[str, Tensor]:
    """What an adapter adds to the weights of a model."""
    model, sites = built(name)
    weights = read_adapter(source, "a", sites, model=model, strict=strict).weights
    return {path: w.scale * w.B.float() @ w.A.float() for path, w in weights.items()}


@cache
def built(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = MODELS[name].model().eval()
    return model, build_sites(model, LoraConfig(target_modules="all-linear"))[1]


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(MODELS)),
    st.sampled_from(PREFIXES),
    st.sampled_from(sorted(SPELLINGS)),
    st.sampled_from(sorted(LEAVES)),
    st.booleans(),
    st.booleans(),
)
@example("wan", "lora_unet_", "mixed", "lora_down", True, True)  # distillations
@example("wan", "diffusion_model.", "dotted", "lora_down", True, True)
@example("wan", "", "dotted", "one name", False, True)  # DiffSynth
@example("flux", "", "dotted", "lora_down", True, False)  # ComfyUI
@example("flux", "lycoris_", "underscored", "lora_down", True, False)  # SimpleTuner
@example("unet", "unet.", "dotted", "lora_down", True, True)  # OneTrainer
@example("llama", "", "dotted", "lora_A", True, False)
def test_any_prefix_spelling_and_leaf(
    name: str, prefix: str, spelling: str, leaf: str, alpha: bool, first: bool
) -> None:
    model = built(name)[0]
    tensors: dict[str, Tensor] = {}
    want: dict[str, Tensor] = {}
    torch.manual_seed(1)
    for path, older in MODELS[name].modules.items():
        weight = model.get_submodule(path).weight
        a, b = torch.randn(3, weight.shape[1]), torch.randn(weight.shape[0], 3)
        saved = prefix + SPELLINGS[spelling](older if first and older else path)
        tensors |= {f"{saved}.{LEAVES[leaf][0]}": a, f"{saved}.{LEAVES[leaf][1]}": b}
        if alpha:
            tensors[f"{saved}.alpha"] = torch.tensor(2.0)
        want[path] = b @ a * (2 / 3 if alpha else 1)
    # A prefix of a pipeline's, and a model of diffusers, say that α is r.
    if name == "llama" and not alpha and prefix in ("", "base_model.model.", "model."):
        with pytest.raises(CheckpointError, match="without α"):
            deltas(name, tensors)
        return
    if name == "llama" and prefix == "model." and spelling != "dotted":
        with pytest.raises(CheckpointError, match=r"model\.model_layers"):
            deltas(name, tensors)
        return
    got = deltas(name, tensors)
    assert got.keys() == want.keys()
    for path, delta in got.items():
        torch.testing.assert_close(delta, want[path])


def pair(path: str, k: int, n: int, ends: tuple[str, str] = LEAVES["lora_down"]) -> Any:
    return {f"{path}.{ends[0]}": torch.randn(2, k), f"{path}.{ends[1]}": torch.randn(n, 2)}


def test_names_of_two_implementations_that_diffusers_splits() -> None:
    """XLabs' of Flux's q, k and v."""
    path = "double_blocks.0.processor.qkv_lora1"
    tensors = pair(path, 16, 48, ("down.weight", "up.weight"))
    got = deltas("flux", tensors)
    whole = tensors[f"{path}.up.weight"] @ tensors[f"{path}.down.weight"]
    assert list(got) == [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    torch.testing.assert_close(torch.cat(list(got.values())), whole)


def test_older_names_of_attentions() -> None:
    path = f"unet.{_DOWN}.attn1.processor"
    ends = ("down.weight", "up.weight")
    got = deltas(
        "unet", {**pair(f"{path}.to_q_lora", 8, 8, ends), **pair(f"{path}.to_out_lora", 8, 8, ends)}
    )
    assert got.keys() == {f"{_DOWN}.attn1.to_q", f"{_DOWN}.attn1.to_out.0"}
    model = tiny_pipelines.clip(False, layers=1)
    own = "encoder.layers.0.self_attn"
    file = pair(f"text_encoder.text_model.{own}.to_out_lora", 8, 8, ends)
    _, sites = build_sites(model, LoraConfig(target_modules="all-linear"))
    assert read_adapter(file, "a", sites, model=model).weights.keys() == {f"{own}.out_proj"}


def test_what_is_foreign_after_a_conversion_is_named_and_may_be_ignored() -> None:
    """A file for images to video in a model without images."""
    torch.manual_seed(0)
    file = pair("diffusion_model.blocks.0.self_attn.q", 16, 16)
    for name in ("q", "k_img", "v_img"):
        file |= pair(f"diffusion_model.blocks.0.cross_attn.{name}", 16, 16)
    with pytest.raises(CheckpointError, match="factors for 2 modules of this model") as raised:
        deltas("wan", file)
    for name in ("attn2.add_k_proj (blocks.0.cross_attn.k_img)", "cross_attn.v_img"):
        assert f"blocks.0.{name.removeprefix('blocks.0.')}" in str(raised.value)
    assert "attn1" not in str(raised.value)
    got = deltas("wan", lorafx.AdapterSource(file, ignore=["[kv]_img"]))
    assert got.keys() == {"blocks.0.attn1.to_q", "blocks.0.attn2.to_q"}


@pytest.mark.parametrize(
    ("ignore", "message"), [(["none"], "matches no key"), ("(", "no regular"), (7, "no regular")]
)
def test_what_cannot_be_ignored(ignore: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"ignore: .* {message}"):
        deltas("flux", lorafx.AdapterSource(pair("proj_out", 16, 16), ignore=ignore))


@pytest.mark.parametrize("component", ["unet", "transformer", "diffusion_model"])
def test_a_denoiser_by_any_of_its_names(component: str) -> None:
    file = pair("lora_unet_double_blocks_0_img_attn_proj", 16, 16) | pair("lora_te1_a", 8, 8)
    got = deltas("flux", lorafx.AdapterSource(file, component=component))
    assert got.keys() == {"transformer_blocks.0.attn.to_out.0"}


def test_a_file_of_a_language_model_has_no_scale_by_its_prefix() -> None:
    """GPT-2's own prefix is a component's name."""
    model = GPT2Model(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=16))
    _, sites = build_sites(model, LoraConfig(target_modules=["c_attn"]))
    file = pair("transformer.h.0.attn.c_attn", 8, 24, LEAVES["lora_A"])
    with pytest.raises(CheckpointError, match="has no configuration, and 'transformer'"):
        read_adapter(file, "a", sites, model=model)
    source = lorafx.AdapterSource(file, config={"r": 2, "lora_alpha": 6})
    assert read_adapter(source, "a", sites, model=model).weights["h.0.attn.c_attn"].scale == 3


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_factors_in_float8_are_read_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = {k: t.to(dtype) for k, t in pair("proj_out", 16, 16).items()}
    want = [t.float() for t in file.values()]
    save_file(file, tmp_path / "a.safetensors")
    for source in (file, tmp_path / "a.safetensors"):
        torch.testing.assert_close(deltas("flux", source)["proj_out"], want[1] @ want[0])
    with pytest.raises(CheckpointError, match=r"is torch.int8; factors are read in .*float8_e5m2"):
        deltas("flux", {key: t.float().to(torch.int8) for key, t in file.items()})


@pytest.mark.parametrize(
    ("name", "module", "warns"),
    [
        ("Qwen2ForCausalLM", "transformers.models.qwen2.modeling_qwen2", True),
        ("LlamaModel", "transformers.models.llama.modeling_llama", False),
        ("OptimizedModule", "torch._dynamo.eval_frame", False),
        (None, 7, False),
    ],
)
def test_a_configuration_that_names_another_class(name: Any, module: Any, warns: bool) -> None:
    path = "model.layers.0.self_attn.q_proj"
    file = pair(path, 24, 24, LEAVES["torchtune"])
    classes = {"base_model_class": name, "parent_library": module}
    source = lorafx.AdapterSource(file, config={"r": 2, "lora_alpha": 2, "auto_mapping": classes})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert deltas("llama", source).keys() == {path}
    assert any("was trained on a Qwen2ForCausalLM" in str(w.message) for w in caught) == warns
    if warns:
        with pytest.raises(CheckpointError, match="was trained on a Qwen2"):
            deltas("llama", source, strict=True)


def test_two_names_of_one_module_are_never_one() -> None:
    """Conversions would keep the last."""
    name = "double_blocks.0.img_attn.proj"
    file = pair(f"transformer.{name}", 16, 16) | pair(f"unet.{name}", 16, 16)
    with pytest.raises(CheckpointError, match=r"img_attn"):
        deltas("flux", file)
