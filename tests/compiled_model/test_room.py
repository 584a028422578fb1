"""Adapters that need more room than was made: the error names the setting that makes it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import REFERENCE, TOLERANCE, Case, error, save_adapter
from own_weights import save_own
from torch import nn

import lorafx
from lorafx.errors import CapacityError, CheckpointError

TARGETS = ["up", "down"]


@pytest.fixture(scope="module")
def served(plain) -> Any:
    config = lorafx.LoraConfig(target_modules=TARGETS, max_rank=4, max_adapters=2)
    return lorafx.compile(plain.model(), config, options=REFERENCE, dynamic=False)


def check(served: Any, base: nn.Module, folder: Path, kind: type[Exception], said: str) -> None:
    """It is refused and nothing changes; a model compiled with what the error names serves it."""
    before = served.adapters, served.adapter_versions, served.memory()
    with pytest.raises(kind, match=said) as refusal:
        served.load_adapter(folder, "large")
    assert (served.adapters, served.adapter_versions, served.memory()) == before
    named = re.search(r"LoraConfig\((.+?)\)[,.\n]|LoraConfig\((.+?)\)$", str(refusal.value))
    settings: dict[str, Any] = {"target_modules": TARGETS, "max_rank": 4}
    if named:
        settings |= eval(f"dict({named[1] or named[2]})")
    else:
        found = re.search(
            r"- (\w+) exists but was not selected.*add it to (\w+)", str(refusal.value)
        )
        assert found is not None
        settings[found[2]] = [*settings[found[2]], found[1]]
    case = Case(base, {"large": folder})
    config = lorafx.LoraConfig(**settings)
    cm = lorafx.compile(case.model(), config, options=REFERENCE, dynamic=False)
    cm.load_adapter(folder, "large")
    inputs = {"ids": torch.arange(8).view(2, 4)}
    got = cm(**inputs, adapter_names=["large", None])["logits"]
    if "modules_to_save" in settings or "trainable_tokens" in settings:
        assert not torch.allclose(got[0], case.expected([None], {"ids": inputs["ids"][:1]})[0])
        assert error(got[1:], case.expected([None], {"ids": inputs["ids"][1:]})) <= TOLERANCE
    else:
        assert error(got, case.expected(["large", None], inputs)) <= TOLERANCE


def test_a_larger_rank(served, plain, tmp_path):
    folder = save_adapter(plain.base, tmp_path, rank=7, targets=TARGETS, seed=1)
    check(served, plain.base, folder, CapacityError, r"LoraConfig\(max_rank=7\)")


def test_a_module_without_a_bank(served, plain, tmp_path):
    folder = save_adapter(plain.base, tmp_path, rank=2, targets=["up", "gate"], seed=2)
    check(served, plain.base, folder, CheckpointError, "gate exists but was not selected")


def test_a_weight_of_its_own(served, plain, tmp_path):
    own = {"target_modules": ["up"], "modules_to_save": ["head"], "r": 2}
    folder = save_own(plain.base, tmp_path, seed=3, **own)
    check(served, plain.base, folder, CapacityError, r"LoraConfig\(modules_to_save=\['head'\]\)")
