"""Methods whose weights are functions of the base's, against what PEFT merges."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from dense_merge import random_base
from method_files import TARGETS, merged, save
from safetensors.torch import load_file

from lorafx.adapter_store.methods.factored import as_factors
from lorafx.adapter_store.saved import AdapterSource, Saved, read_source
from lorafx.errors import CheckpointError

CONFIGS = {"hira": peft.HiraConfig(r=3, rank_pattern={"v_proj": 2}, target_modules=TARGETS)}


def read(folder: Path, base: torch.nn.Module, **changed: torch.Tensor) -> Saved:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    for end, tensor in changed.items():
        tensors[next(key for key in tensors if key.endswith(end))] = tensor
    return as_factors(read_source(AdapterSource(tensors, config=config)), base)


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_those_that_peft_merges(name: str, tmp_path: Path) -> None:
    base = random_base("llama", num_hidden_layers=1).double()
    folder = save(base, CONFIGS[name], tmp_path / name)
    made = read(folder, base).made
    want = merged(base, folder)
    assert len(made) == len(TARGETS)
    for key, of in made.items():
        path = key.removeprefix("base_model.model.").removesuffix(".lora_W.weight")
        assert of.weight is not None
        got = of.weight.weight(base.get_submodule(path).weight.detach())
        torch.testing.assert_close(got, want.get_submodule(path).weight.detach())


@pytest.mark.parametrize("bad", [torch.ones(7, 5), torch.full((3, 64), torch.nan)])
def test_what_does_not_fit_is_named(bad: torch.Tensor, tmp_path: Path) -> None:
    base = random_base("llama", num_hidden_layers=1)
    folder = save(base, CONFIGS["hira"], tmp_path / "hira")
    with pytest.raises(CheckpointError, match="hira_"):
        read(folder, base, hira_A=bad)
