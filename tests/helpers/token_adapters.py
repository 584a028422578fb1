"""Models with two adapters on disk, and their oracle: W + Σ wᵢ ΔWᵢ applied token by token."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, OPTConfig
from transformers.models.opt.modeling_opt import OPTForCausalLM

import lorafx

VOCABULARY = 61
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
}


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2))


def opt() -> nn.Module:
    """Its feed-forward sees (batch · tokens, hidden)."""
    sizes = {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 32}
    return OPTForCausalLM(OPTConfig(**SIZES, **sizes, dropout=0.0))


def bert() -> nn.Module:
    config = BertConfig(**SIZES, intermediate_size=48, max_position_embeddings=32)
    return BertModel(config, add_pooling_layer=False)


TARGETS = {
    llama: (["q_proj", "v_proj"], ["up_proj", "down_proj", "o_proj", "embed_tokens"]),
    opt: (["fc1", "fc2"], ["q_proj", "k_proj", "out_proj"]),
    bert: (["query", "value"], ["intermediate.dense", "output.dense", "word_embeddings"]),
}


class Served:
    """A model with two adapters on disk, and its oracle by token."""

    def __init__(self, build, folder: Path, targets=None, *, dynamic=True, **options) -> None:
        torch.manual_seed(0)
        self.base = build().eval()
        self.deltas: list[dict[str, Tensor]] = []
        self.paths = {}
        for index, names in enumerate(targets or TARGETS[build]):
            peft_model = get_peft_model(
                copy.deepcopy(self.base), LoraConfig(r=3 + index, target_modules=names)
            )
            for name, parameter in peft_model.named_parameters():
                if "lora_" in name:
                    nn.init.normal_(parameter, std=0.2)
            self.paths[f"a{index}"] = str(folder / f"a{index}")
            peft_model.save_pretrained(self.paths[f"a{index}"])
            merged = dict(peft_model.merge_and_unload().named_parameters())
            own = dict(self.base.named_parameters())
            self.deltas.append({name: merged[name] - own[name] for name in own})
        options = {"lowering": "reference", **options}
        config = lorafx.LoraConfig(max_rank=8, max_adapters=4)
        self.cm = lorafx.compile(
            copy.deepcopy(self.base), config, adapters=self.paths, options=options, dynamic=dynamic
        )

    def oracle(self, slots: Tensor, **inputs: Tensor) -> Tensor:
        """Every linear and embedding adds x ΔWᵀ of each token's own adapter."""
        return self.mixed((slots[..., None] == torch.arange(2)).float(), **inputs)

    def mixed(self, mix: Tensor, **inputs: Tensor) -> Tensor:
        """The same with the weight of each adapter for each token, (B, T, 2)."""
        model = copy.deepcopy(self.base)
        for path, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                deltas = [delta.get(f"{path}.weight") for delta in self.deltas]
                module.register_forward_hook(token_hook(deltas, mix))
        with torch.no_grad():
            return model(**inputs)[0]


def token_hook(deltas: list[Tensor | None], mix: Tensor):
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for index, delta in enumerate(deltas):
            if delta is None or not delta.any():
                continue
            if isinstance(module, nn.Embedding):
                added = nn.functional.embedding(args[0], delta)
            else:
                added = args[0] @ delta.T
            output = output + added * mix[..., index].reshape(*added.shape[:-1], 1)
        return output

    return hook


def inputs_of(rows: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (rows, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
