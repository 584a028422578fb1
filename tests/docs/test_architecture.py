"""Files that docs/architecture.md and CONTRIBUTING.md name are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[2]
FOLDERS = ("lorafx", "passes", "kernels", "tests", "docs", "examples", "benchmarks")
NAME = re.compile(r"`([\w./-]+\.(?:py|cpp|h|js|patch|jinja))`")


def added() -> set[str]:
    """The files that patches of examples/commits make."""
    patches = (ROOT / "examples" / "commits").glob("*.patch")
    return {
        name for path in patches for name in re.findall(r"^\+\+\+ b/(.+)$", path.read_text(), re.M)
    }


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_every_file_that_is_named_exists(page: str) -> None:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")]
    there = {f"/{path.relative_to(ROOT).as_posix()}" for path in [*paths, *ROOT.glob("*.py")]}
    there |= {f"/{name}" for name in added()}
    named = set(NAME.findall((ROOT / page).read_text()))
    assert len(named) > 20
    lost = {name for name in named if not any(path.endswith(f"/{name}") for path in there)}
    assert not lost
