"""Only lorafx/torch_internals touches private parts of torch, triton, transformers and peft."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafx.torch_internals import entries

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "lorafx" / "torch_internals"


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
    found = {str(path.relative_to(ROOT)): entries.names_in(path.read_text()) for path in sources()}
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
    assert name in entries.names_in(line)


@pytest.mark.parametrize(
    "line", ["import torch\ntorch.nn.Module()", "from torch import fx, __version__"]
)
def test_what_is_public_is_not(line: str) -> None:
    assert entries.names_in(line) == set()


def test_each_module_that_names_private_parts_has_an_entry() -> None:
    known = {row.module for row in entries.table()}
    named = {path.stem for path in FOLDER.glob("*.py") if entries.names_in(path.read_text())}
    assert named == known
    assert all(row.names and row.entry.use and row.entry.ended_by for row in entries.table())
