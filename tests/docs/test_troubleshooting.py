"""docs/guides/troubleshooting.md quotes messages that lorafx has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

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
