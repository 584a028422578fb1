"""Multi-head latent attention with absorbed weights, as servers compute it, and the oracle that is
not absorbed: transformers' DeepseekV3.

    unabsorbed   k_h = W_UK,h c,  v_h = W_UV,h c,   scores q_hᵀ k_h,  out W_UV,h (Σ p c)
    absorbed     scores (W_UK,hᵀ q_h)ᵀ c,           out W_UV,h (Σ p c),  c shared by all heads

`kv_b_proj.weight` (H·(n + v), L) holds W_UK,h (n, L) and W_UV,h (v, L) for each head in turn.
`post_process` leaves them on each attention module in one of several ways (`KEPT`), and the forward
multiplies by them in one of several ways (`PRODUCTS`), so that `kv_b_proj` itself never runs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from dense_merge import Case, case_by_targets, random_base
from tiny_models import VOCAB, Family
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
    apply_rotary_pos_emb_interleave,
)


def dense_weight(layer: nn.Module) -> Tensor:
    """W (N, K) of a linear, dequantised where its `quant_method` has to."""
    method = getattr(layer, "quant_method", None)
    return layer.weight.detach() if method is None else method.dequantize(layer)


def parts(w: Tensor, heads: int, n: int, v: int) -> tuple[Tensor, Tensor]:
    """W_UK (H, n, L) and W_UV (H, v, L), views."""
    w_uk, w_uv = w.view(heads, n + v, w.shape[-1]).split([n, v], dim=1)
    return w_uk, w_uv


def _attributes(owner: nn.Module, w_uk: Tensor, w_uv: Tensor) -> None:
    owner.w_uk, owner.w_uv = w_uk, w_uv


def _buffers(owner: nn.Module, w_uk: Tensor, w_uv: Tensor) -> None:
    owner.register_buffer("w_uk", w_uk, persistent=False)
    owner.register_buffer("w_uv", w_uv, persistent=False)


def _copies(owner: nn.Module, w_uk: Tensor, w_uv: Tensor) -> None:
    owner.w_uk, owner.w_uv = w_uk.contiguous(), w_uv.contiguous()


def _permuted_copies(owner: nn.Module, w_uk: Tensor, w_uv: Tensor) -> None:
    owner.w_uk = w_uk.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    owner.register_buffer("w_uv", w_uv.permute(1, 2, 0).contiguous().permute(2, 0, 1))


def _parameters(owner: nn.Module, w_uk: Tensor, w_uv: Tensor) -> None:
    owner.w_uk = nn.Parameter(w_uk.clone(), requires_grad=False)
    owner.w_uv = nn.Parameter(w_uv.clone(), requires_grad=False)


KEPT: dict[str, Callable[[nn.Module, Tensor, Tensor], None]] = {
    "views": _attributes,
    "views in buffers": _buffers,
    "copies": _copies,
    "permuted copies": _permuted_copies,
    "parameters": _parameters,
}


def by_bmm(x: Tensor, blocks: Tensor) -> Tensor:
    """(B, H, T, a) by (H, a, b), heads in front and tokens of all requests together."""
    batch, heads, tokens, _ = x.shape
    flat = x.transpose(0, 1).reshape(heads, batch * tokens, -1)
    return torch.bmm(flat, blocks).view(heads, batch, tokens, -1).transpose(0, 1)


def by_matmul(x: Tensor, blocks: Tensor) -> Tensor:
    """Broadcast over the requests."""
    return x @ blocks


PRODUCTS = {"bmm": by_bmm, "matmul": by_matmul}


class AbsorbedAttention(DeepseekV3Attention):
    """DeepseekV3Attention that computes with what `post_process` left, without a cache."""

    product: Callable[[Tensor, Tensor], Tensor] = staticmethod(by_bmm)

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.w_uk, self.w_uv

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **_):
        batch, length, _ = hidden_states.shape
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        q = q.view(batch, length, -1, self.qk_head_dim).transpose(1, 2)
        q_nope, q_rot = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        latent = self.kv_a_proj_with_mqa(hidden_states)
        c, k_rot = latent.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        c, k_rot = self.kv_a_layernorm(c), k_rot.unsqueeze(1)
        q_rot, k_rot = apply_rotary_pos_emb_interleave(q_rot, k_rot, *position_embeddings)
        w_uk, w_uv = self.weights()
        q_latent = self.product(q_nope, w_uk)  # (B, H, T, L)
        scores = q_latent @ c.unsqueeze(1).mT + q_rot @ k_rot.mT
        scores = scores * self.scaling
        if attention_mask is not None:
            scores = scores + attention_mask
        latents = torch.softmax(scores, dim=-1) @ c.unsqueeze(1)
        out = self.product(latents, w_uv.transpose(1, 2))
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1)), None


class AbsorbedInForward(AbsorbedAttention):
    """Cuts the weight in every call."""

    def weights(self) -> tuple[Tensor, Tensor]:
        w = dense_weight(self.kv_b_proj)
        return parts(w, self.num_heads, self.qk_nope_head_dim, self.v_head_dim)


def absorb(model: nn.Module, cls: type[nn.Module], product: str = "bmm") -> list[nn.Module]:
    """Have every attention module of a DeepSeek-V3 compute as `cls` does."""
    found = [module for module in model.modules() if isinstance(module, DeepseekV3Attention)]
    for module in found:
        module.__class__ = cls
        module.product = PRODUCTS[product]
    return found


def post_process(model: nn.Module, kept: str = "views") -> None:
    """Cut every attention module's `kv_b_proj` into W_UK and W_UV."""
    for module in model.modules():
        if isinstance(module, AbsorbedAttention):
            w = dense_weight(module.kv_b_proj)
            cut = parts(w, module.num_heads, module.qk_nope_head_dim, module.v_head_dim)
            KEPT[kept](module, *cut)


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
    return case_by_targets(base, folder, targets)


def states(rows: int, length: int) -> dict[str, Tensor]:
    return {"inputs_embeds": torch.randn(rows, length, 24)}


def absorbed(case: Case, cls: type[nn.Module] = AbsorbedAttention, product: str = "bmm"):
    model = case.model()
    absorb(model, cls, product)
    return model
