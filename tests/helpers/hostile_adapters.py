"""An adapter whose files a test may damage, and the two ways in which lorafx reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lorafx.adapter_store.peft_config import PeftConfig, targeted_paths
from lorafx.adapter_store.peft_reader import Adapter, adapter_target_modules, read_adapter
from lorafx.config import LoraConfig
from lorafx.model.sites import Site
from lorafx.runtime.marking import build_sites

CONFIG, SAFETENSORS, PICKLED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
#: A configuration with something in each field that is read.
SETTINGS: dict[str, Any] = {
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "base_model_name_or_path": "some/model",
    "r": 2,
    "lora_alpha": 4,
    "use_rslora": False,
    "use_dora": False,
    "bias": "none",
    "init_lora_weights": True,
    "fan_in_fan_out": False,
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": r".*\.k_proj",
    "rank_pattern": {r"layers\.1\.v_proj": 3},
    "alpha_pattern": {".*q_proj": 8},
    "layers_to_transform": None,
    "layers_pattern": None,
    "target_parameters": None,
}


class Small(nn.Module):
    """Three layers of two linears, an embedding and routed experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(6, 5) for name in ("q_proj", "v_proj")})
            for _ in range(3)
        )
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.zeros(3, 8, 6))
        self.experts.down_proj = nn.Parameter(torch.zeros(3, 6, 4))


def small() -> tuple[nn.Module, tuple[Site, ...]]:
    """The model, and all of its sites."""
    torch.manual_seed(0)
    model = Small().eval()
    _, sites = build_sites(
        model, LoraConfig(target_modules=["q_proj", "v_proj", "embed", "experts"])
    )
    return model, sites


def tensors() -> dict[str, Tensor]:
    """Factors that fit `SETTINGS` and the model."""
    found = {}
    for layer in range(3):
        for name in ("q_proj", "v_proj"):
            rank = 3 if (layer, name) == (1, "v_proj") else 2
            path = f"base_model.model.layers.{layer}.{name}"
            found[f"{path}.lora_A.weight"] = torch.ones(rank, 6)
            found[f"{path}.lora_B.weight"] = torch.ones(5, rank)
    for expert in range(3):
        path = f"base_model.model.experts.{expert}.down_proj"
        found[f"{path}.lora_A.weight"] = torch.ones(2, 4)
        found[f"{path}.lora_B.weight"] = torch.ones(6, 2)
    return found


def write(folder: Path, *, pickled: bool = False, **settings: Any) -> Path:
    """The adapter in `folder`, its configuration with other `settings`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({**SETTINGS, **settings}))
    if pickled:
        torch.save(tensors(), folder / PICKLED)
    else:
        (folder / SAFETENSORS).write_bytes(save(tensors()))
    return folder


def read(folder: Path, model: nn.Module, sites: tuple[Site, ...]) -> Adapter:
    """Everything that lorafx reads of the folder: its targets, what they pick, its factors."""
    adapter_target_modules(folder, model)
    targeted_paths(PeftConfig.read(folder), model)
    return read_adapter(folder, "a", sites, model=model, max_rank=64)
