"""Only lorafx/torch_internals touches private parts of torch, triton, transformers and peft."""

from __future__ import annotations

from pathlib import Path

import pytest
from private_names import FOLDER, names_by_module, names_in

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
