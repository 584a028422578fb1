"""DoRA adapters beside plain ones: made by PEFT, or by hand where it cannot name the modules.

W' = m ⊙ (W + s·B A) / ‖W + s·B A‖    by output, m drawn around the norms
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from dense_merge import Case, random_base, save_adapter
from hand_made import SCALE
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, RANKS
from torch import Tensor, nn

#: Which of a family's five lists of targets each adapter has; "p…" are plain.
PLANS = {"d0": 0, "d1": 1, "p2": 2, "d3": 3}


def dora_case(
    base: nn.Module, folder: Path, targets: Mapping[str, Any], config: Mapping[str, Any] = {}
) -> Case:
    """A `Case` with an adapter for each keyword, DoRA where its name begins with "d"."""
    folders = {
        name: save_adapter(
            base,
            folder / name,
            rank=RANKS[seed],
            targets=own,
            seed=seed,
            use_dora=name.startswith("d"),
            **config,
        )
        for seed, (name, own) in enumerate(targets.items())
    }
    return Case(base, folders)


def family_case(name: str, folder: Path, **changes: Any) -> Case:
    """DoRA and plain adapters of a family of `tiny_models`."""
    family = FAMILIES[name]
    targets = {adapter: family.targets[plan] for adapter, plan in PLANS.items()}
    return dora_case(random_base(family, **changes), folder, targets, family.config)


def add_magnitudes(folder: Path, magnitudes: Mapping[str, Tensor]) -> None:
    """Make the saved adapter DoRA, with these m (N,) by module path."""
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    added = {
        f"base_model.model.{path}.lora_magnitude_vector": m.contiguous()
        for path, m in magnitudes.items()
    }
    save_file({**load_file(file), **added}, file)
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter, by key."""
    return load_file(folder / "adapter_model.safetensors")


def rescaled_weight(weight: Tensor, pair: Sequence[Tensor], m: Tensor) -> Tensor:
    """W' for A and B of `hand_made.factors`."""
    total = weight + SCALE * (pair[1] @ pair[0])
    return m[:, None] * total / torch.linalg.vector_norm(total, dim=1, keepdim=True)
