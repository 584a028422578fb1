"""A PEFT adapter's files written in other dialects, each by its documented layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorafx

WEIGHTS = "adapter_model.safetensors"


def factors(folder: Path) -> Iterator[tuple[str, str, Tensor]]:
    """(module, "A" or "B", tensor) of a PEFT folder, those of embeddings included."""
    for key, tensor in load_file(folder / WEIGHTS).items():
        plain = key.removeprefix("base_model.model.").removesuffix(".weight")
        module, _, factor = plain.rpartition(".")
        yield module, factor[-1], tensor


def alpha(folder: Path) -> float:
    return json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]


def rank(folder: Path) -> int:
    return json.loads((folder / "adapter_config.json").read_text())["r"]


def as_mlx(folder: Path, target: Path) -> Path:
    target.mkdir()
    tensors = {f"{m}.lora_{x.lower()}": t.mT.contiguous() for m, x, t in factors(folder)}
    save_file(tensors, target / "adapters.safetensors")
    scale = alpha(folder) / rank(folder)
    settings = {
        "fine_tune_type": "lora",
        "num_layers": 16,
        "lora_parameters": {"rank": rank(folder), "scale": scale, "dropout": 0.0},
    }
    (target / "adapter_config.json").write_text(json.dumps(settings))
    return target


def as_loralib(folder: Path, target: Path) -> Path:
    torch.save({f"{m}.lora_{x}": t for m, x, t in factors(folder)}, target)
    return target


def as_kohya(folder: Path, target: Path, prefix: str = "lora_unet_") -> Path:
    names = {"A": "lora_down.weight", "B": "lora_up.weight"}
    tensors = {}
    for module, letter, tensor in factors(folder):
        name = prefix + module.replace(".", "_")
        tensors[f"{name}.{names[letter]}"] = tensor
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha(folder)))
    save_file(tensors, target, {"ss_network_module": "networks.lora"})
    return target


def as_diffusers(folder: Path, target: Path, component: str = "unet") -> Path:
    names = {"A": "lora.down.weight", "B": "lora.up.weight"}
    tensors = {}
    for module, letter, tensor in factors(folder):
        tensors[f"{component}.{module}.{names[letter]}"] = tensor
        tensors[f"{component}.{module}.alpha"] = torch.tensor(float(alpha(folder)))
    save_file(tensors, target)
    return target


def as_bare(folder: Path, target: Path) -> Path:
    target.mkdir()
    tensors = load_file(folder / WEIGHTS)
    save_file(
        {k.removeprefix("base_model.model."): t for k, t in tensors.items()}, target / WEIGHTS
    )
    (target / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    return target


WRITERS: dict[str, Callable[[Path, Path], Path]] = {
    "mlx": as_mlx,
    "loralib": as_loralib,
    "kohya": as_kohya,
    "diffusers": as_diffusers,
    "peft": as_bare,
}


def source(name: str, folder: Path, file: Path) -> lorafx.AdapterSource:
    config = {"lora_alpha": alpha(folder)} if name == "loralib" else None
    return lorafx.AdapterSource(file, config=config)


class Tree(nn.Module):
    """Linears at dotted paths."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__()
        for number, path in enumerate(paths):
            *parents, last = path.split(".")
            module: nn.Module = self
            for name in parents:
                if name not in module._modules:
                    module.add_module(name, nn.Module())
                module = module._modules[name]
            module.add_module(last, nn.Linear(3 + number, 4))
