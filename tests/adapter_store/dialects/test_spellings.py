"""Any prefix before any spelling of a path, with any leaf: each factor arrives at its module with its
scale, or the file is refused by a message that names what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import pytest
import tiny_pipelines
import torch
from dense_merge import random_base
from diffusers import WanTransformer3DModel
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lorafx
from lorafx.adapter_store.peft_reader import read_adapter
from lorafx.config import LoraConfig
from lorafx.errors import CheckpointError, LorafxError
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
        lambda: random_base("llama", num_hidden_layers=1),
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
            **{f"blocks.{i}.ffn.{a}": f"blocks.{i}.ffn.{b}" for i in (0, 1) for a, b in _FFN.items()},
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


@cache
def built(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = MODELS[name].model().eval()
    return model, build_sites(model, LoraConfig(target_modules="all-linear"))[1]


@settings(max_examples=2000, deadline=None)
@given(
    st.sampled_from(sorted(MODELS)),
    st.sampled_from(PREFIXES),
    st.sampled_from(sorted(SPELLINGS)),
    st.sampled_from(sorted(LEAVES)),
    st.booleans(),
    st.booleans(),
)
def test_any_prefix_spelling_and_leaf(
    name: str, prefix: str, spelling: str, leaf: str, alpha: bool, first: bool
) -> None:
    model, sites = built(name)
    tensors: dict[str, Tensor] = {}
    want: dict[str, Tensor] = {}
    torch.manual_seed(1)
    for path, older in MODELS[name].modules.items():
        weight = model.get_submodule(path).weight
        a, b = torch.randn(3, weight.shape[1]), torch.randn(weight.shape[0], 3)
        saved = prefix + SPELLINGS[spelling](older if first and older else path)
        tensors |= {f"{saved}.{end}": tensor for end, tensor in zip(LEAVES[leaf], (a, b))}
        if alpha:
            tensors[f"{saved}.alpha"] = torch.tensor(2.0)
        want[path] = b @ a * (2 / 3 if alpha else 1)
    try:
        adapter = read_adapter(tensors, "a", sites, model=model)
    except LorafxError as error:
        print("REFUSED", name, prefix, spelling, leaf, alpha, first, str(error)[:300].replace("\n"," "))
        return
    assert adapter.weights.keys() == want.keys()
    for path, weights in adapter.weights.items():
        torch.testing.assert_close(weights.scale * weights.B @ weights.A, want[path])
