"""What is done as soon as a module of another library has been imported."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import lorafx  # noqa: F401  offers its experts
from lorafx.torch_internals.imports import when_imported


def test_when_a_module_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, after its own code; at once if it has been imported. A module that fails is none."""
    (tmp_path / "later_module.py").write_text("number = 3\n")
    (tmp_path / "failing_module.py").write_text("import no_such_module_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    finders, seen = list(sys.meta_path), list[Any]()
    for name in ("later_module", "failing_module"):
        when_imported(name, lambda module: seen.append(module.number))
    assert not seen
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        importlib.import_module("failing_module")
    assert importlib.import_module("later_module").number == 3
    when_imported("later_module", lambda module: seen.append(-module.number))
    assert seen == [3, -3]
    assert sys.meta_path == finders
    monkeypatch.delitem(sys.modules, "later_module")


def test_transformers_knows_lorafxs_experts() -> None:
    assert "lorafx" in ALL_EXPERTS_FUNCTIONS.valid_keys()
