"""CONTRIBUTING.md: its worked commits apply to today's code, their tests pass, and it names a test
command for every folder of tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMITS = sorted((ROOT / "examples" / "commits").glob("*.patch"))
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
#: What the tests of the commits need.
NEEDED = ("lorafx", "passes", "kernels", "tests/helpers", "tests/conformance", "benchmarks")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for folder in NEEDED:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=ignored)
    for file in ("pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / file, tmp_path / file)
    return tmp_path


def git_apply(patch: Path, folder: Path, *options: str) -> None:
    # A repository around the folder is none of its business.
    outside = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = ["git", "apply", *options, str(patch)]
    done = subprocess.run(command, cwd=folder, env=outside, capture_output=True, text=True)
    assert done.returncode == 0, f"{patch.name} applies no longer:\n{done.stderr}"


def files_of(patch: Path) -> list[str]:
    return re.findall(r"^\+\+\+ b/(.+)$", patch.read_text(), re.MULTILINE)


@pytest.mark.quick
@pytest.mark.parametrize("patch", COMMITS, ids=lambda patch: patch.stem)
def test_the_guide_names_the_files_of_each_commit_in_their_order(patch: Path) -> None:
    (about,) = re.findall(rf"^Worked commit: \[{patch.name}\].*$", GUIDE, re.MULTILINE)
    named = re.findall(r"`([^` ]+/[^` ]+)`", about.partition(" Run ")[0])
    assert named == files_of(patch)
    assert any(f"pytest {file}`" in about for file in named)
    if shutil.which("git") is not None:
        git_apply(patch, ROOT, "--check")


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
@pytest.mark.slow
def test_worked_commits_apply_and_their_tests_pass(checkout: Path) -> None:
    assert len(COMMITS) == 4
    for patch in COMMITS:
        git_apply(patch, checkout, "--check")  # each by itself
    for patch in COMMITS:
        git_apply(patch, checkout)
    tests = [name for patch in COMMITS for name in files_of(patch) if "/test_" in name]
    assert len(tests) == 4
    # In place of the lorafx that is installed.
    own = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=checkout, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.quick
def test_every_folder_of_tests_has_a_command() -> None:
    folders = {
        path.relative_to(ROOT).parts[1]
        for path in (ROOT / "tests").glob("*/**/test_*.py")
        if "__pycache__" not in path.parts
    }
    commands = re.findall(r"\btests/(\w+)", GUIDE.partition("## Test commands")[2])
    assert folders == set(commands)
    assert all((ROOT / "tests" / name).is_dir() for name in commands)
