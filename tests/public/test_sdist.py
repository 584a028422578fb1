"""The source distribution: all that its tests need, the links once, and a description without links
that lead nowhere."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from email import message_from_string
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINKS = {"lorafx/passes": "../passes", "lorafx/kernels": "../kernels"}
FOLDERS = (".ci", "benchmarks", "docs", "examples", "kernels", "lorafx", "passes", "tests")
FILES = (
    *("CITATION.cff", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md"),
    *("constraints.txt", "mkdocs.yml", "pyproject.toml", "setup.py", ".gitignore"),
)
MADE = shutil.ignore_patterns("__pycache__", "*.pyc")
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tarfile.TarInfo]]:
    """What the archive of a copy of the checkout unpacks to, and its entries."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("out")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=MADE)
    for file in FILES:
        shutil.copy(ROOT / file, copy / file)
    command = [sys.executable, "-c", BUILD, str(out)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(out / done.stdout.split()[-1]) as archive:
        members = archive.getmembers()
        # As pip does; Python 3.11 has filters from 3.11.4 on.
        safely: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(out, **safely)
    return next(path for path in out.iterdir() if path.is_dir()), members


def files_in(root: Path) -> set[str]:
    """Files below `root`, without what links lead to and what was made there."""
    return {
        path.relative_to(root).as_posix()
        for folder in FOLDERS
        for path in (root / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
        if not any(parent.is_symlink() for parent in path.parents)
    }


def test_it_holds_the_checkout_and_the_links_once(unpacked) -> None:
    root, members = unpacked
    assert sorted(files_in(root)) == sorted(files_in(ROOT))
    assert all((root / file).is_file() for file in FILES)
    prefix = f"{root.name}/"
    links = {m.name.removeprefix(prefix): m.linkname for m in members if m.issym()}
    assert links == LINKS
    names = [member.name for member in members]
    assert len(names) == len(set(names))
    assert not any(name.startswith(f"{prefix}{link}/") for name in names for link in LINKS)
    for link in LINKS:
        assert (root / link / "__init__.py").samefile(root / Path(link).name / "__init__.py")


def test_the_description_has_no_link_that_leads_nowhere(unpacked) -> None:
    root, _ = unpacked
    text = message_from_string((root / "PKG-INFO").read_text())
    assert text["Description-Content-Type"] == "text/markdown"
    body = text.get_payload()
    assert body.startswith("# lorafx")
    assert "pip install" in body
    targets = re.findall(r"\]\(([^)]*)\)", body)
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []


def test_with_the_address_of_the_repository_links_lead_into_it() -> None:
    setup: dict[str, Any] = runpy.run_path(str(ROOT / "setup.py"))
    readme, source = (ROOT / "README.md").read_text(), "https://example.org/lorafx"
    made = setup["description"](readme, source)
    targets = re.findall(r"\]\(([^)]*)\)", made)
    assert f"{source}/raw/HEAD/docs/pictures/cpu.svg" in targets
    assert f"{source}/blob/HEAD/docs/performance.md#on-a-gpu" in targets
    outside = [target for target in targets if not target.startswith("#")]
    assert all(target.startswith(source) for target in outside)
    for target in outside:
        path = target.removeprefix(f"{source}/").split("/", 2)[2].partition("#")[0]
        assert (ROOT / path).exists(), target
