"""Adapters under the names that base weights may have too: of wrapped models."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from dense_merge import Case, check_mixed, random_base, save_adapter
from safetensors.torch import load_file, save_file
from tiny_models import token_inputs

import lorafx

pytestmark = pytest.mark.usefixtures("fixed_sizes")

PREFIX = "base_model.model."
#: What each wrapper makes of `base_model.model.<path>.lora_A.weight`.
NAMINGS: dict[str, Callable[[str], str]] = {
    "DDP outside": lambda key: f"module.{key}",
    "DDP inside": lambda key: key.replace(PREFIX, f"{PREFIX}module."),
    "FSDP": lambda key: re.sub(r"layers\.(\d+)", r"layers.\1._fsdp_wrapped_module", key),
    "checkpointing": lambda key: key.replace("mlp.", "mlp._checkpoint_wrapped_module."),
    "compiled": lambda key: f"_orig_mod.{key}",
    "without the head": lambda key: key.replace(f"{PREFIX}model.", PREFIX),
}


def renamed(folder: Path, rename: Callable[[str], str]) -> None:
    """Give the factors in `folder` other keys."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    changed = {rename(key): tensor for key, tensor in tensors.items()}
    assert changed.keys().isdisjoint(tensors)
    save_file(changed, file)


def test_a_mixed_batch_of_every_naming(tmp_path: Path) -> None:
    base = random_base("llama", num_hidden_layers=1)
    folders = {
        name: save_adapter(base, tmp_path / name, rank=2, targets=["down_proj"], seed=seed)
        for seed, name in enumerate(NAMINGS)
    }
    case = Case(base, folders)
    for name in NAMINGS:
        case.alone(name)  # the oracle reads the names that PEFT gave
        renamed(folders[name], NAMINGS[name])
    cm = lorafx.compile(case.model(), folders, options={"lowering": "reference"})
    assert all(site.path.endswith("down_proj") for site in cm.sites)
    names = [*NAMINGS, None]
    check_mixed(cm, case, names, token_inputs(len(names), 6))
