"""Models whose attention is absorbed, and the oracle that is not: transformers' DeepseekV3."""

from __future__ import annotations

import torch
import transformers
from absorbed import (
    AbsorbedAttention,
    absorb,
)
from dense_merge import Case, random_base, save_adapter
from tiny_models import VOCAB, Family
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

REFERENCE = {"lowering": "reference"}


def config(**changes: object) -> transformers.DeepseekV3Config:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "q_lora_rank": 10,
        "kv_lora_rank": 14,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 5,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
        "max_position_embeddings": 64,
        "attn_implementation": "eager",
        "use_cache": False,
        **changes,
    }
    return transformers.DeepseekV3Config(**sizes)


def deepseek() -> nn.Module:
    return transformers.DeepseekV3ForCausalLM(config())


class OneLayer(nn.Module):
    """The attention of DeepSeek-V3 alone, causal."""

    def __init__(self, **changes: object) -> None:
        super().__init__()
        self.rotary = DeepseekV3RotaryEmbedding(config(**changes))
        self.self_attn = DeepseekV3Attention(config(**changes), 0)

    def forward(self, inputs_embeds: Tensor) -> dict[str, Tensor]:
        length = inputs_embeds.shape[1]
        positions = torch.arange(length)[None]
        mask = torch.full((length, length), -1e9).triu(1)[None, None]
        rotary = self.rotary(inputs_embeds, positions)
        return {"logits": self.self_attn(inputs_embeds, rotary, mask)[0]}


def case_of(build, folder) -> Case:
    """Adapter c does not touch kv_b_proj."""
    base = random_base(Family(build, ()))
    targets = {"a": ["kv_b_proj"], "b": ["kv_b_proj", "q_b_proj", "o_proj"], "c": ["o_proj"]}
    folders = {
        name: save_adapter(base, folder / name, rank=rank, targets=paths, seed=rank)
        for rank, (name, paths) in enumerate(targets.items(), 2)
    }
    return Case(base, folders)


def states(rows: int, length: int) -> dict[str, Tensor]:
    return {"inputs_embeds": torch.randn(rows, length, 24)}


def absorbed(case: Case, cls: type[nn.Module] = AbsorbedAttention, product: str = "bmm"):
    model = case.model()
    absorb(model, cls, product)
    return model
