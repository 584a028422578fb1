"""Tables of docs/torch_internals.md are made from the code: EXPECTTEST_ACCEPT=1 writes them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from lorafx.torch_internals import versions
from lorafx.torch_internals.shortcuts import SHORTCUTS

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "torch_internals.md"
END = "<!-- end -->"


def listed(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}"


def versions_tested() -> str:
    """The sentence that README.md has as well."""
    pairs = [f"{torch} (triton {triton})" for torch, triton in versions.TORCH.items()]
    found = {"torch": pairs, "transformers": versions.TRANSFORMERS, "PEFT": versions.PEFT}
    return f"Tested: {'; '.join(f'{name} {listed(known)}' for name, known in found.items())}.\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |\n" for row in (columns, *rows)]
    return "".join((lines[0], f"|{'---|' * len(columns)}\n", *lines[1:]))


def shortcuts() -> str:
    return table(
        ("shortcut", "without it", "what it saves"),
        [(f"`{name}`", own.replaces, own.gains) for name, own in SHORTCUTS.items()],
    )


@pytest.mark.parametrize("part", [versions_tested, shortcuts])
def test_the_page_is_made_from_the_code(part) -> None:
    begin = f"<!-- {'versions' if part is versions_tested else part.__name__} -->\n"
    page = PAGE.read_text()
    before, rest = page.split(begin)
    _, end, after = rest.partition(END)
    wanted = f"{before}{begin}{part()}{end}{after}"
    if os.environ.get("EXPECTTEST_ACCEPT"):
        PAGE.write_text(wanted)
    assert page == wanted, "run this test with EXPECTTEST_ACCEPT=1"


def test_the_readme_has_the_versions() -> None:
    assert versions_tested().strip() in (ROOT / "README.md").read_text()
