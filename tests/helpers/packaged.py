"""Logits of a package, written and loaded where the model is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import lorafx


def served(
    base: nn.Module,
    folders: Mapping[str, Path],
    inputs: Mapping[str, Tensor],
    names: Sequence[str | None],
    *,
    path: Path,
    device: torch.device | str = "cpu",
) -> Tensor:
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    example = {**inputs, "use_cache": False}
    package = lorafx.load(lorafx.export(base.to(device), folders, example, path))
    for name, folder in folders.items():
        package.load_adapter(folder, name)
    logits: Tensor = package(**inputs, adapter_names=names)["logits"]
    return logits
