"""Only lorafx/torch_internals touches private parts of torch, triton, transformers and peft, and
tables of docs/torch_internals.md are made from the code: EXPECTTEST_ACCEPT=1 writes them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from private_names import FOLDER, names_by_module, names_in

from lorafx.torch_internals import versions
from lorafx.torch_internals.shortcuts import SHORTCUTS

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[2]


def sources() -> list[Path]:
    """All of the program but that folder. lorafx/passes and lorafx/kernels are links."""
    found = [
        path for name in ("lorafx", "passes", "kernels") for path in (ROOT / name).rglob("*.py")
    ]
    links = (ROOT / "lorafx" / "passes", ROOT / "lorafx" / "kernels")
    apart = (FOLDER, *links)
    return [path for path in found if not any(path.is_relative_to(folder) for folder in apart)]


def test_nothing_else_names_private_parts() -> None:
    assert len(sources()) > 200
    found = {str(path.relative_to(ROOT)): names_in(path.read_text()) for path in sources()}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("import torch._dynamo", "torch._dynamo"),
        ("from torch.fx.experimental import proxy_tensor", "torch.fx.experimental.proxy_tensor"),
        ("import torch\nx = torch._dynamo.config.y", "torch._dynamo.config.y"),
        ("import triton.compiler as c\nx = c.f", "triton.compiler.f"),
    ],
)
def test_it_would_be_seen(line: str, name: str) -> None:
    assert name in names_in(line)


@pytest.mark.parametrize(
    "line", ["import torch\ntorch.nn.Module()", "from torch import fx, __version__"]
)
def test_what_is_public_is_not(line: str) -> None:
    assert names_in(line) == set()


def test_the_page_has_a_row_for_each_module_that_names_private_parts() -> None:
    page = (ROOT / "docs" / "torch_internals.md").read_text()
    rows = [
        line.split("`")[1]
        for line in page.splitlines()
        if line.startswith("| `") and ".py`" in line
    ]
    assert rows == [f"{module}.py" for module in names_by_module()]


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
