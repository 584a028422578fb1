"""Tiny random models of the families that the tests name, and what adapters of each target.

Depth is the part of gpt2 and gemma3: two layers, of which some adapters touch one. The other
families have one layer.

A `Family` is a constructor, its inputs for a batch, and the target modules of five adapters of
unequal ranks. Sizes differ from one another wherever the architecture lets them, so that a mixed-up
dimension cannot fit by accident.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB = 61
RANKS = (2, 5, 3, 8, 1)


class PlainModel(nn.Module):
    """An embedding, a branch that is called twice, a bias-free linear and a bare dictionary out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 12)
        self.up = nn.Linear(12, 20)
        self.gate = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12, bias=False)
        self.head = nn.Linear(12, VOCAB)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        for _ in range(2):
            x = x + self.down(torch.relu(self.gate(x)) * self.up(x))
        return {"logits": self.head(x)}


def token_inputs(rows: int, length: int) -> dict[str, Tensor]:
    """Ids and a mask in which row b has b % 3 padding tokens on the left."""
    ids = torch.randint(3, VOCAB, (rows, length))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row % min(3, length)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def right_padded(rows: int, length: int) -> dict[str, Tensor]:
    inputs = token_inputs(rows, length)
    return {**inputs, "attention_mask": inputs["attention_mask"].flip(1)}


def seq2seq_inputs(rows: int, length: int) -> dict[str, Tensor]:
    inputs = right_padded(rows, length)
    return {**inputs, "decoder_input_ids": torch.randint(3, VOCAB, (rows, max(1, length - 2)))}


def image_inputs(rows: int, length: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(rows, 3, 16, 16)}


def plain_inputs(rows: int, length: int) -> dict[str, Tensor]:
    return {"ids": torch.randint(0, VOCAB, (rows, length))}


@dataclass(frozen=True)
class Family:
    """How to build a tiny model, to feed it, and what five adapters of it target."""

    build: Callable[..., nn.Module]
    targets: tuple[Any, ...]
    inputs: Callable[[int, int], dict[str, Tensor]] = token_inputs
    config: Mapping[str, Any] = field(default_factory=dict)


def _model(config: type, model: type, **sizes: Any) -> Callable[..., nn.Module]:
    def build(**changes: Any) -> nn.Module:
        return model(config(**{"vocab_size": VOCAB, **sizes, **changes}))

    return build


LLAMA_SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
}
ONE_LAYER = {**LLAMA_SIZES, "num_hidden_layers": 1}
_LLAMA_TARGETS = (
    ["q_proj", "v_proj"],
    "all-linear",
    ["gate_proj", "up_proj", "down_proj"],
    ["embed_tokens", "o_proj", "lm_head"],
    ["layers.0.self_attn.k_proj"],
)

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        _model(transformers.LlamaConfig, transformers.LlamaForCausalLM, **ONE_LAYER),
        _LLAMA_TARGETS,
    ),
    "qwen3": Family(
        _model(transformers.Qwen3Config, transformers.Qwen3ForCausalLM, **ONE_LAYER, head_dim=10),
        _LLAMA_TARGETS,
    ),
    "gpt2": Family(
        _model(transformers.GPT2Config, transformers.GPT2LMHeadModel, **LLAMA_SIZES, n_inner=40),
        (
            ["c_attn"],
            "all-linear",
            ["mlp.c_fc", "mlp.c_proj"],
            ["attn.c_proj", "wte"],
            ["h.1.attn.c_attn"],
        ),
        config={"fan_in_fan_out": True},
    ),
    "phi3": Family(
        _model(transformers.Phi3Config, transformers.Phi3ForCausalLM, **ONE_LAYER),
        (
            ["qkv_proj"],
            "all-linear",
            ["gate_up_proj", "down_proj"],
            ["embed_tokens", "o_proj", "lm_head"],
            ["layers.0.mlp.gate_up_proj"],
        ),
    ),
    "gemma3": Family(
        _model(
            transformers.Gemma3TextConfig,
            transformers.Gemma3ForCausalLM,
            **LLAMA_SIZES,
            head_dim=10,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        ),
        (*_LLAMA_TARGETS[:3], ["embed_tokens", "o_proj"], _LLAMA_TARGETS[4]),
    ),
    "bert": Family(
        _model(transformers.BertConfig, transformers.BertForMaskedLM, **ONE_LAYER),
        (
            ["query", "value"],
            "all-linear",
            ["intermediate.dense", "output.dense"],
            ["word_embeddings", "key"],
            ["layer.0.attention.self.key"],
        ),
        right_padded,
    ),
    "t5": Family(
        _model(
            transformers.T5Config,
            transformers.T5ForConditionalGeneration,
            d_model=24,
            d_kv=6,
            d_ff=40,
            num_layers=1,
            num_decoder_layers=1,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        (
            ["q", "v"],
            "all-linear",
            ["wi", "wo"],
            ["shared", "o"],
            ["decoder.block.0.layer.1.EncDecAttention.k"],
        ),
        seq2seq_inputs,
    ),
    "vit": Family(
        _model(
            transformers.ViTConfig,
            transformers.ViTForImageClassification,
            **ONE_LAYER,
            image_size=16,
            patch_size=8,
            num_labels=7,
        ),
        (
            ["q_proj", "v_proj"],
            "all-linear",
            r".*mlp\.fc[12]",
            ["classifier"],
            ["layers.0.attention.k_proj"],
        ),
        image_inputs,
    ),
    "plain": Family(
        lambda **_: PlainModel(),
        (["up"], "all-linear", ["down"], ["embed", "head"], ["gate"]),
        plain_inputs,
    ),
}
