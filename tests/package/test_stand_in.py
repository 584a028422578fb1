"""Adapters that are read without the model fill banks as with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import Case, case_by_targets
from packed_models import MAPPING, Apart, Packed
from torch import nn

import lorafx
from lorafx.adapter_store.peft_reader import read_adapter
from lorafx.adapter_store.store import AdapterStore
from lorafx.package.stand_in import constants_of, described, substitute_for

pytestmark = [pytest.mark.any_sizes, pytest.mark.quick]


def check(model: nn.Module, config: lorafx.LoraConfig, folders: Mapping[str, Path]) -> None:
    cm = lorafx.compile(model, config, adapters=folders, options={"lowering": "reference"})
    program = cm._session.program
    stand_in, sites, groups, read_config = substitute_for(
        json.loads(json.dumps(described(program)))
    )
    store = AdapterStore(groups, read_config.max_adapters)
    for name, folder in folders.items():
        store.load(read_adapter(folder, name, sites, model=stand_in, lora_config=read_config))
    names = list(folders)
    assert store.acquire(names) == cm._session.store.acquire(names)
    want, got = constants_of(program.groups), constants_of(groups)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert any(tensor.any() for tensor in got.values())


def test_llama(llama: Case) -> None:
    check(llama.model(), lorafx.LoraConfig(max_rank=8), llama.folders)


@pytest.mark.parametrize("packed", [True, False])
def test_packed_and_single_projections(packed: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    case = case_by_targets(
        Apart().eval(), tmp_path, {"a": r".*\.(q|v|o)_proj", "b": r".*\.(gate|up)_proj|.*_z"}
    )
    model: Any = Packed().eval() if packed else case.model()
    declared = {} if packed else {k: v for k, v in MAPPING.items() if k != "in_proj_qkvz"}
    check(model, lorafx.LoraConfig(packed_modules=declared), case.folders)
