"""Pages against the code: public names in docs/reference/, the version, messages that
docs/guides/troubleshooting.md quotes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

import lorafx

pytestmark = pytest.mark.quick

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
#: What the rest of lorafx uses of a compiled model, and what is refused.
NOT_FOR_USERS = {"attached", "by_itself", "capture", "compile", "entry", "generates"}


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


ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "guides" / "troubleshooting.md"
#: What stands for a value of the message: an ellipsis, a name in quotes, a number.
VALUE = re.compile(r"\.\.\.|'[^']*'|\b\d+\b")


def messages() -> Iterator[str]:
    """The strings of the sources but docstrings, with a line for each value in an f-string."""
    for folder in ("lorafx", "passes", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            nodes = [*ast.walk(ast.parse(path.read_text()))]
            said = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
            for node in nodes:
                if isinstance(node, ast.JoinedStr):
                    parts = [v.value if isinstance(v, ast.Constant) else "\n" for v in node.values]
                    yield "".join(map(str, parts))
                elif isinstance(node, ast.Constant) and id(node) not in said:
                    yield str(node.value)


def quoted() -> list[str]:
    """The messages in the first column of the page's tables, and there alone."""
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    found = [text for row in rows for text in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    return [text for text in found if " " in text and not text.startswith("for ")]


def test_every_message_that_is_quoted_is_one_of_the_sources() -> None:
    known = "\n\n".join(messages())
    assert len(quoted()) > 15
    for text in quoted():
        pieces = [piece.strip(" ;:") for piece in VALUE.split(text)]
        told = [piece for piece in pieces if " " in piece]
        assert told, text
        for piece in told:
            assert piece in known, f"{piece!r} of {text!r} is in no message"
