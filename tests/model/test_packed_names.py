"""Which parts of packed modules the names of an adapter may mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dense_merge import REFERENCE
from hand_made import random_factors
from packed_models import twins
from torch import nn

import lorafx
from lorafx import layers
from lorafx.errors import CheckpointError

pytestmark = pytest.mark.quick


def _open(model: nn.Module, **config: Any) -> Any:
    return lorafx.compile(model.eval(), lorafx.LoraConfig(**config), options=REFERENCE)


def test_a_name_that_two_packed_modules_have_is_refused(tmp_path: Path) -> None:
    model = nn.Module()
    model.qkv_proj = layers.MergedColumnParallelLinear(16, [8, 8, 8])
    model.kv_proj = layers.MergedColumnParallelLinear(16, [8, 8])
    model.packed_modules_mapping = {"qkv_proj": ["q", "k", "v"], "kv_proj": ["k", "v"]}
    cm = _open(model)
    with pytest.raises(CheckpointError, match="packed in each of qkv_proj, kv_proj"):
        cm.load_adapter(random_factors(tmp_path / "k", "k", 8), "k")
    cm.load_adapter(random_factors(tmp_path / "q", "q", 8), "q")


def test_layers_that_a_peft_configuration_picks(tmp_path: Path) -> None:
    model = nn.ModuleDict({"model": twins()[1]})
    peft = {
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["q_proj", "o_proj"],
        "layers_to_transform": [1],
    }
    cm = lorafx.compile(model.eval(), peft, options=REFERENCE)
    assert sorted(site.path for site in cm.sites) == [
        "model.layers.1.o_proj",
        "model.layers.1.qkv_proj",
    ]
    cm.load_adapter(random_factors(tmp_path / "q", "model.layers.1.q_proj", 16), "q")
    with pytest.raises(CheckpointError, match="k_proj exists but was not selected"):
        cm.load_adapter(random_factors(tmp_path / "k", "model.layers.1.k_proj", 8), "k")
