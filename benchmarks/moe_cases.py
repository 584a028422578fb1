"""What moe.py measures: a model like Qwen3-30B-A3B, adapters of it, floors and errors.

floor(decode)  = 1 + Σ r·(K + N) over the distinct (site, adapter) and (expert, adapter) that a
                 step touches / Σ K·N over the weights that it reads, experts touched only
floor(prefill) = 1 + Σ r·(K + N) over rows / Σ K·N over rows: multiplications
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from protocol import errors, save_adapter
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import lorafx

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
PARAMETERS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight")
RANK = 16

#: Sizes by name: Qwen3-30B-A3B's layers, half as wide with half as many experts, and tiny ones.
SIZES: Mapping[str, Mapping[str, int]] = {
    "real": {
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "vocab_size": 151936 // 48,
    },
    "cpu": {
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "moe_intermediate_size": 384,
        "num_experts": 64,
        "vocab_size": 4096,
    },
    "tiny": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "vocab_size": 128,
    },
}


def build_model(
    size: str, layers: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Qwen3MoeForCausalLM:
    """Random weights; routers of unit gain, so that tokens go to all experts."""
    config = Qwen3MoeConfig(
        **SIZES[size],
        num_hidden_layers=layers,
        num_experts_per_tok=min(8, SIZES[size]["num_experts"] // 2),
        norm_topk_prob=True,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3MoeForCausalLM(config).eval().requires_grad_(False)
    for router in routers(model):
        nn.init.normal_(router.weight, std=config.hidden_size**-0.5)
    return model.to(dtype)


def twin(model: Qwen3MoeForCausalLM) -> Qwen3MoeForCausalLM:
    """A copy over the very same parameters. Copies of the weights differ in speed by where they lie
    (up to 1.18 for batched_mm, between models of the same generated code)."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def quantised(model: Qwen3MoeForCausalLM, kind: str) -> Qwen3MoeForCausalLM | None:
    """A copy with experts in int8 or nf4, by lorafx's implementation, whose dequantised numbers the
    experts of `model` get; None for another kind."""
    stored = copy.deepcopy(model) if kind in ("int8", "nf4") else None
    names = ("gate_up_proj", "down_proj")
    if kind == "int8":
        from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_

        chosen = {rf"re:.*experts\.{name}": Int8WeightOnlyConfig() for name in names}
        quantize_(stored, FqnToConfig(chosen), filter_fn=None)
    for layer, dense in zip(
        stored.model.layers if stored else (), model.model.layers, strict=False
    ):
        for name in names:
            if kind == "nf4":
                from bitsandbytes.nn.parametrize import replace_parameter_4bit

                replace_parameter_4bit(layer.mlp.experts, name, compress_statistics=True)
            parameter = getattr(dense.mlp.experts, name)
            parameter.data.copy_(lorafx.dequantize(layer.mlp.experts, name))
    if stored is not None:
        stored.set_experts_implementation("lorafx")
    return stored


def routers(model: nn.Module) -> list[nn.Module]:
    """The routers of all layers, in order."""
    return [layer.mlp.gate for layer in model.model.layers]


def save_adapters(model: Qwen3MoeForCausalLM, folder: Path, count: int) -> dict[str, str]:
    """Adapters of attention, experts and routers with non-zero B, saved by PEFT, by name."""
    return {
        f"a{index}": save_adapter(
            *(model, folder / f"a{index}", RANK, list(TARGETS)),
            std=0.02,
            seed=index,
            target_parameters=list(PARAMETERS),
        )
        for index in range(count)
    }


def peft_refusal(folder: Path) -> str:
    """What PEFT says to a batch that mixes adapters of a tiny model of the same class."""
    model = build_model("tiny", 1, torch.float32)
    path = save_adapters(model, folder, 1)["a0"]
    peft_model = PeftModel.from_pretrained(model, path, "a0").eval()
    try:
        peft_model(input_ids=torch.zeros(2, 1, dtype=torch.long), adapter_names=["a0", "__base__"])
    except ValueError as error:
        return str(error).partition("\n")[0]
    raise RuntimeError("PEFT took a mixed batch of an adapter with target_parameters")


def routes(model: Qwen3MoeForCausalLM, ids: Tensor) -> list[Tensor]:
    """The experts that the base model chooses for each token, (tokens, k) a layer."""
    found: list[Tensor] = []
    hooks = [
        router.register_forward_hook(lambda module, args, out: found.append(out[2]))
        for router in routers(model)
    ]
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def touched(chosen: Sequence[Tensor]) -> float:
    """How many experts of a layer a step touches, the mean of the layers."""
    return sum(len(layer.unique()) for layer in chosen) / len(chosen)


def floor_of(model: Qwen3MoeForCausalLM, ids: Tensor, chosen: Sequence[Tensor], D: int) -> float:
    """See the module's equations; experts as the base model routes."""
    config, (batch, tokens) = model.config, ids.shape
    heads, kv = (
        n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads)
    )
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    dense = [
        (hidden, heads),
        (hidden, kv),
        (hidden, kv),
        (heads, hidden),
        (hidden, config.num_experts),
    ]
    expert = [(hidden, 2 * inner), (inner, hidden)]
    head = hidden * config.vocab_size
    decode = tokens == 1
    owner = torch.arange(batch, device=ids.device).repeat_interleave(tokens) % max(D, 1)
    weights, factors = head * (1 if decode else batch * tokens), 0
    for layer in chosen:
        pairs = torch.stack([layer.flatten(), owner.repeat_interleave(layer.shape[1])], 1)
        experts = len(layer.unique()) if decode else layer.numel()
        terms = len(pairs.unique(dim=0)) if decode else layer.numel()
        rows = 1 if decode else batch * tokens
        weights += rows * sum(k * n for k, n in dense) + experts * sum(k * n for k, n in expert)
        users = D if decode else rows
        factors += users * sum(k + n for k, n in dense) + terms * sum(k + n for k, n in expert)
    return 1 + RANK * factors / weights if D else 1.0


def largest_errors(
    model: Qwen3MoeForCausalLM, paths: Mapping[str, str], cm: Any, ids: Tensor
) -> tuple[float, float]:
    """Largest error of rows of a mixed batch (adapters' and a base row's) against dense merge in
    float64, of lorafx and of the merged model in the model's own dtype.

    Tokens that float64 sends to other experts are in it: near ties are decided by rounding.
    """
    names: list[str | None] = [*list(paths)[: ids.shape[0] - 1], None]
    names = [*names[:-1], *[None] * (ids.shape[0] - len(names) + 1)]
    plain = twin(model)
    plain.set_experts_implementation("eager")  # grouped_mm has no float64
    logits = cm(input_ids=ids, use_cache=False, adapter_names=names).logits
    ours, merged = zip(*errors(plain, paths, logits, ids, names), strict=True)
    return max(ours), max(merged)
