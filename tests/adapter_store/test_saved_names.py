"""Adapters under the names that base weights may have too: of wrapped models, of inner models."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dense_merge import Case, check_mixed, random_base, save_adapter
from safetensors.torch import load_file, save_file
from tiny_models import token_inputs

import lorafx
from lorafx.adapter_store.peft_reader import read_adapter
from lorafx.prepare.marking import build_sites

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


def test_an_adapter_of_the_model_with_a_head_on_the_inner_one(tmp_path: Path) -> None:
    base = random_base("llama")
    folder = save_adapter(base, tmp_path / "a", rank=2, targets=["q_proj"], seed=1)
    inner = base.model
    _, sites = build_sites(inner, lorafx.LoraConfig(target_modules=["q_proj"]))
    on_inner = read_adapter(folder, "a", sites, model=inner)
    _, sites = build_sites(base, lorafx.LoraConfig(target_modules=["q_proj"]))
    on_whole = read_adapter(folder, "a", sites, model=base)
    assert {f"model.{path}": w.scale for path, w in on_inner.weights.items()} == {
        path: w.scale for path, w in on_whole.weights.items()
    }
    for path, weights in on_inner.weights.items():
        assert torch.equal(weights.B, on_whole.weights[f"model.{path}"].B)
    cm = lorafx.compile(inner, {"a": folder}, options={"lowering": "reference"})
    assert [site.path for site in cm.sites] == list(on_inner.weights)


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.replace("down_proj", "base_layer"),
        lambda key: key.replace("down_proj", "down_proj.base_layer"),
        lambda key: key.replace("down_proj", "down_proj.base_layer.base_layer"),
        lambda key: PREFIX + key,
        lambda key: f"{PREFIX}module.{key}",
    ],
    ids=["no module", "inner factors", "innermost factors", "PEFT in PEFT", "with DDP between"],
)
def test_names_that_lead_nowhere_stay_unknown(tmp_path: Path, rename: Callable[[str], str]) -> None:
    base = random_base("llama")
    folder = save_adapter(base, tmp_path / "a", rank=2, targets=["down_proj"], seed=1)
    renamed(folder, rename)
    config = lorafx.LoraConfig(target_modules=["down_proj"])
    with pytest.raises(lorafx.CheckpointError, match=r"in this model.*nearest"):
        lorafx.compile(base, config, adapters={"a": folder}, options={"lowering": "reference"})
