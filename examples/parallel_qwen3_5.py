"""A Qwen3.5 text model written with lorafx's parallel layers: gated delta nets whose four input
projections are two packed ones, and full attention with an output gate.

It loads a Hugging Face checkpoint, and serves PEFT adapters that were trained on the Hugging Face
model: `in_proj_qkv` covers three of the four slices of `in_proj_qkvz`. One rank only: the
convolution and the decay of the delta nets are not cut.

python examples/parallel_qwen3_5.py
"""

import copy
import tempfile

import peft
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5RMSNorm,
    Qwen3_5RMSNormGated,
    Qwen3_5TextRotaryEmbedding,
    apply_rotary_pos_emb,
    causal_conv1d_fn,
    torch_chunk_gated_delta_rule,
)

import lorafx
from lorafx.layers import (
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    load_weights,
)


class GatedDeltaNet(nn.Module):
    def __init__(self, config: transformers.Qwen3_5TextConfig) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.linear_num_value_heads
        self.key_size, self.value_size = config.linear_key_head_dim, config.linear_value_head_dim
        keys = config.linear_num_key_heads * self.key_size
        values = heads * self.value_size
        self.sizes = (2 * keys + values, values)
        self.qkv_sizes = (keys, keys, values)
        self.in_proj_qkvz = MergedColumnParallelLinear(
            hidden, [keys, keys, values, values], bias=False, disable_tp=True
        )
        self.in_proj_ba = MergedColumnParallelLinear(
            hidden, [heads, heads], bias=False, disable_tp=True
        )
        channels, kernel = self.sizes[0], config.linear_conv_kernel_dim
        self.conv1d = nn.Conv1d(channels, channels, kernel, groups=channels, bias=False)
        self.activation = config.hidden_act
        self.dt_bias = nn.Parameter(torch.ones(heads))
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.norm = Qwen3_5RMSNormGated(self.value_size, config.rms_norm_eps)
        self.out_proj = RowParallelLinear(values, hidden, bias=False, disable_tp=True)

    def forward(self, x: Tensor) -> Tensor:
        qkv, z = self.in_proj_qkvz(x).split(self.sizes, dim=-1)
        b, a = self.in_proj_ba(x).chunk(2, dim=-1)
        weight = self.conv1d.weight.squeeze(1)
        qkv = causal_conv1d_fn(qkv.transpose(1, 2), weight, None, activation=self.activation)
        q, k, v = qkv.transpose(1, 2).split(self.qkv_sizes, dim=-1)
        y, _ = torch_chunk_gated_delta_rule(
            q.unflatten(-1, (-1, self.key_size)),
            k.unflatten(-1, (-1, self.key_size)),
            v.unflatten(-1, (-1, self.value_size)),
            g=-self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias),
            beta=b.sigmoid(),
            use_qk_l2norm_in_kernel=True,
        )
        y = self.norm(y.reshape(-1, self.value_size), z.reshape(-1, self.value_size))
        return self.out_proj(y.reshape(*x.shape[:-1], -1))


class Attention(nn.Module):
    def __init__(self, config: transformers.Qwen3_5TextConfig) -> None:
        super().__init__()
        hidden, size = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        bias = config.attention_bias
        # A query head and its output gate lie side by side in q_proj: twice as many heads.
        self.qkv_proj = QKVParallelLinear(hidden, size, 2 * heads, kv_heads, bias, disable_tp=True)
        self.o_proj = RowParallelLinear(heads * size, hidden, bias, disable_tp=True)
        self.q_norm = Qwen3_5RMSNorm(size, config.rms_norm_eps)
        self.k_norm = Qwen3_5RMSNorm(size, config.rms_norm_eps)
        self.head_size = size

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(x).split(self.qkv_proj.output_partition_sizes, dim=-1)
        q, gate = q.unflatten(-1, (-1, 2 * self.head_size)).chunk(2, dim=-1)
        k, v = (y.unflatten(-1, (-1, self.head_size)) for y in (k, v))
        q, k = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)
        return self.o_proj((y.transpose(1, 2) * gate.sigmoid()).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: transformers.Qwen3_5TextConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden, [inner, inner], bias=False, disable_tp=True
        )
        self.down_proj = RowParallelLinear(inner, hidden, bias=False, disable_tp=True)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    def __init__(self, config: transformers.Qwen3_5TextConfig, index: int) -> None:
        super().__init__()
        self.full_attention = config.layer_types[index] == "full_attention"
        if self.full_attention:
            self.self_attn = Attention(config)
        else:
            self.linear_attn = GatedDeltaNet(config)
        self.mlp = MLP(config)
        self.input_layernorm = Qwen3_5RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3_5RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = self.input_layernorm(x)
        x = x + (self.self_attn(y, cos, sin) if self.full_attention else self.linear_attn(y))
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: transformers.Qwen3_5TextConfig) -> None:
        super().__init__()
        vocabulary, hidden = config.vocab_size, config.hidden_size
        self.embed_tokens = VocabParallelEmbedding(vocabulary, hidden, disable_tp=True)
        self.layers = nn.ModuleList(
            DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = Qwen3_5RMSNorm(hidden, config.rms_norm_eps)
        self.rotary_emb = Qwen3_5TextRotaryEmbedding(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        # Time, height and width: of text all three are the position.
        cos, sin = self.rotary_emb(x, positions.expand(3, 1, -1))
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class ParallelQwen35(nn.Module):
    """Module names are those of Qwen3_5ForCausalLM, but for the packed ones."""

    packed_modules_mapping = {  # noqa: RUF012  (a plain dictionary, as serving models have it)
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
        "in_proj_qkvz": {"in_proj_qkv": (0, 1, 2), "in_proj_z": (3,)},
        "in_proj_ba": ["in_proj_b", "in_proj_a"],
    }

    def __init__(self, config: transformers.Qwen3_5TextConfig) -> None:
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, disable_tp=True)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, T) ids → (B, T, V) logits."""
        return self.lm_head(self.model(input_ids))


def main() -> None:
    torch.manual_seed(0)
    config = transformers.Qwen3_5TextConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=6,
        initializer_range=0.2,
    )
    reference = transformers.Qwen3_5ForCausalLM(config).eval()
    ids = torch.randint(0, config.vocab_size, (3, 8))

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        model = ParallelQwen35(config).eval()
        loaded = load_weights(model, reference.state_dict())
        alone = {None: reference(ids).logits}
        torch.testing.assert_close(model(ids), alone[None])
        print(f"{len(loaded)} parameters loaded; logits equal those of {type(reference).__name__}")

        plans = {"delta": ["in_proj_qkv", "in_proj_z"], "attention": ["q_proj", "v_proj"]}
        for name, targets in plans.items():
            adapter = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
            trained = peft.get_peft_model(copy.deepcopy(reference), adapter)  # a training run
            trained.save_pretrained(f"{folder}/{name}")
            alone[name] = trained(ids).logits

        cm = lorafx.compile(model, {name: f"{folder}/{name}" for name in plans})
        names = ["delta", None, "attention"]
        logits = cm(ids, adapter_names=names)
        for row, name in enumerate(names):
            error = (logits[row] - alone[name][row]).abs().max() / alone[name].abs().max()
            assert error <= 1e-5, f"row {row} is off by {error:.1e}"
            print(f"row {row}: {name or 'base'}: as when served alone")


if __name__ == "__main__":
    main()
