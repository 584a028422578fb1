"""Adapters of other methods than LoRA, drawn and saved by PEFT, and their oracle: what PEFT itself
merges, in float64."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from dense_merge import Case, random_base
from peft.tuners.lora import BdLoraConfig
from safetensors.torch import load_file, save_file
from sums import SumCase
from torch import nn

TARGETS = ["q_proj", "v_proj", "down_proj", "gate_proj"]
_TO = {"target_modules": TARGETS}
_BANK = {"r": 2, "num_vectors": 10, "vector_length": 4, "topk": 2}
#: Configurations for a tiny Llama by the names of the adapters.
CONFIGS: Mapping[str, peft.PeftConfig] = {
    "lora": peft.LoraConfig(r=3, lora_alpha=4, **_TO),
    "loha": peft.LoHaConfig(
        r=2, alpha=3, rank_pattern={"q_proj": 3}, alpha_pattern={"down_proj": 5}, **_TO
    ),
    "lokr": peft.LoKrConfig(r=2, alpha=3, **_TO),
    "lokr factor 2": peft.LoKrConfig(r=5, alpha=3, decompose_factor=2, target_modules=["q_proj"]),
    "lokr both": peft.LoKrConfig(r=1, alpha=2, decompose_both=True, decompose_factor=4, **_TO),
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, total_step=10, **_TO),
    "miss": peft.MissConfig(r=5, **_TO),
    "miss mini": peft.MissConfig(r=4, mini_r=4, init_weights="mini", **_TO),
    "delora": peft.DeloraConfig(r=3, delora_lambda=4, rank_pattern={"v_proj": 2}, **_TO),
    "gralora": peft.GraloraConfig(r=4, gralora_k=2, hybrid_r=2, alpha=6, **_TO),
    "gralora alone": peft.GraloraConfig(r=2, gralora_k=2, alpha=3, **_TO),
    "vblora": peft.VBLoRAConfig(**_BANK, **_TO),
    "vblora topk": peft.VBLoRAConfig(save_only_topk_weights=True, **_BANK, **_TO),
    "unilora": peft.UniLoraConfig(r=2, theta_d_length=32, save_indices=True, **_TO),
    "pvera": peft.PveraConfig(r=4, **_TO),
    "pvera drawn": peft.PveraConfig(r=4, save_projection=False, projection_prng_key=7, **_TO),
    "vera": peft.VeraConfig(r=4, **_TO),
    "vera drawn": peft.VeraConfig(r=4, save_projection=False, projection_prng_key=-5, **_TO),
    "tinylora": peft.TinyLoraConfig(r=3, u=5, **_TO),
    "tinylora tied": peft.TinyLoraConfig(r=2, u=7, weight_tying=1.0, **_TO),
    "bdlora": peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_bdlora=BdLoraConfig(
            target_modules_bd_a=["down_proj"],
            target_modules_bd_b=["q_proj", "gate_proj"],
            nblocks=2,
            match_strict=False,
        ),
        **_TO,
    ),
}
#: Parameters that are not drawn.
_KEPT = ("ranknum", "delora_lambda", "pvera_A", "pvera_B")


def save(base: nn.Module, config: peft.PeftConfig, folder: Path, gain: float = 0.3) -> Path:
    """An adapter of this configuration with random numbers, as PEFT saves it."""
    torch.manual_seed(len(folder.name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
        before = {id(parameter) for parameter in base.parameters()}
        for name, parameter in model.named_parameters():
            adapted = parameter.requires_grad and id(parameter) not in before
            if adapted and not any(kept in name for kept in _KEPT):
                nn.init.normal_(parameter, std=gain)
        model.save_pretrained(str(folder))
    return folder


@torch.no_grad()
def merged(base: nn.Module, folder: Path) -> nn.Module:
    """`base` in float64 with the adapter merged into it by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base).double(), str(folder))
        return twin.double().merge_and_unload().eval()


@dataclass(eq=False)
class _MergedByPeft(Case):
    def alone(self, name: str | None) -> nn.Module:
        if name is None:
            return self.base
        if name not in self.merged:
            self.merged[name] = merged(self.base, self.folders[name])
        return self.merged[name]


class MethodCase(SumCase, _MergedByPeft):
    """A case whose oracle is what PEFT merges, also of sums."""

    @classmethod
    def of_configs(
        cls, family: str, configs: Mapping[str, peft.PeftConfig], root: Path
    ) -> MethodCase:
        base = random_base(family, num_hidden_layers=1)
        return cls(
            base, {name: save(base, config, root / name) for name, config in configs.items()}
        )


def damage(folder: Path, end: str, tensor: torch.Tensor | None) -> None:
    """Put `tensor` in the place of the one whose key ends so, or nothing."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    (key,) = (key for key in tensors if key.endswith((end, f"{end}.weight")))
    tensors.pop(key)
    if tensor is not None:
        tensors[key] = tensor
    save_file(tensors, file)
