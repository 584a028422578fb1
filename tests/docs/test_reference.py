"""docs/reference/ has every public name; changelog and citation have the version."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch import nn

import lorafx

pytestmark = pytest.mark.quick

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
#: What the rest of lorafx uses of a compiled model, and what is refused.
NOT_FOR_USERS = {"by_itself", "capture", "compile", "entry", "generates"}


def shown(page: str) -> set[str]:
    """The last parts of the names that mkdocstrings is asked for."""
    return {path.split(".")[-1] for path in re.findall(r"^::: (\S+)", page, re.MULTILINE)}


def test_every_public_name_has_its_place() -> None:
    pages = "\n".join(path.read_text() for path in REFERENCE.glob("*.md"))
    elsewhere = {"__version__", "errors", "layers", *vars(lorafx.errors)}  # errors.md, layers.md
    assert set(lorafx.__all__) - elsewhere <= shown(pages)


def test_every_method_of_a_compiled_model_has_its_place() -> None:
    own = {name for name in dir(lorafx.CompiledModel) if not name.startswith("_")}
    wanted = own - set(dir(nn.Module)) - NOT_FOR_USERS
    page = (REFERENCE / "compiled_model.md").read_text()
    assert wanted <= shown(page)


def test_the_version_is_the_same_everywhere() -> None:
    root, version = REFERENCE.parents[1], lorafx.__version__
    assert f"\nversion: {version}\n" in (root / "CITATION.cff").read_text()
    assert f"version = {{{version}}}" in (root / "docs" / "citing.md").read_text()
    headings = re.findall(r"^## (\S+)$", (root / "docs" / "changelog.md").read_text(), re.MULTILINE)
    assert headings[0] == version
