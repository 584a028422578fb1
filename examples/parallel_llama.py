"""A Llama written with lorafx's parallel layers: it loads a Hugging Face checkpoint, and serves
PEFT adapters that were trained on the Hugging Face model.

python examples/parallel_llama.py
"""

import copy
import tempfile

import peft
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

import lorafx
from lorafx.layers import (
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    QuantizeMethodBase,
    RowParallelLinear,
    VocabParallelEmbedding,
    load_weights,
)


class Attention(nn.Module):
    def __init__(self, config: transformers.LlamaConfig, quant: QuantizeMethodBase | None) -> None:
        super().__init__()
        hidden, size = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        bias = config.attention_bias
        self.qkv_proj = QKVParallelLinear(hidden, size, heads, kv_heads, bias, quant_method=quant)
        self.o_proj = RowParallelLinear(heads * size, hidden, bias, quant_method=quant)
        self.head_size = size

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv = self.qkv_proj(x).split(self.qkv_proj.output_partition_sizes, dim=-1)
        q, k, v = (y.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for y in qkv)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: transformers.LlamaConfig, quant: QuantizeMethodBase | None) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden, [inner, inner], bias, quant_method=quant
        )
        self.down_proj = RowParallelLinear(inner, hidden, bias, quant_method=quant)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    def __init__(self, config: transformers.LlamaConfig, quant: QuantizeMethodBase | None) -> None:
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, quant)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, quant)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: transformers.LlamaConfig, quant: QuantizeMethodBase | None) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, quant) for _ in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        cos, sin = self.rotary_emb(x, positions)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class ParallelLlama(nn.Module):
    """Module names are those of LlamaForCausalLM, but for the packed ones."""

    packed_modules_mapping = {  # noqa: RUF012  (a plain dictionary, as serving models have it)
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(
        self, config: transformers.LlamaConfig, quant_method: QuantizeMethodBase | None = None
    ) -> None:
        super().__init__()
        self.model = Decoder(config, quant_method)
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, T) ids → (B, T, V) logits."""
        return self.lm_head(self.model(input_ids))


def main() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    reference = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, config.vocab_size, (3, 8))

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        model = ParallelLlama(config).eval()
        loaded = load_weights(model, reference.state_dict())
        alone = {None: reference(ids).logits}
        torch.testing.assert_close(model(ids), alone[None])
        print(f"{len(loaded)} parameters loaded; logits equal those of {type(reference).__name__}")

        for name, targets in (("attention", ["q_proj", "v_proj"]), ("mlp", ["up_proj"])):
            adapter = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
            trained = peft.get_peft_model(copy.deepcopy(reference), adapter)  # a training run
            trained.save_pretrained(f"{folder}/{name}")
            alone[name] = trained(ids).logits

        cm = lorafx.compile(model, {name: f"{folder}/{name}" for name in ("attention", "mlp")})
        names = ["mlp", None, "attention"]
        logits = cm(ids, adapter_names=names)
        for row, name in enumerate(names):
            torch.testing.assert_close(logits[row], alone[name][row])
            print(f"row {row}: {name or 'base'}: as when served alone")


if __name__ == "__main__":
    main()
