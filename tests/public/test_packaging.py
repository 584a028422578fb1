"""What pyproject.toml puts into a wheel: every package once, and the files that they read."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
#: Where a package's files are, by the longest name that its own begins with.
FOLDERS = {name: ROOT / folder for name, folder in SETTINGS["package-dir"].items()}


def folder_of(package: str) -> Path:
    root = max((name for name in FOLDERS if f"{package}.".startswith(f"{name}.")), key=len)
    return FOLDERS[root].joinpath(*package.removeprefix(root).split("."))


def package_of(folder: Path, root: str) -> str:
    return ".".join((root, *folder.relative_to(FOLDERS[root]).parts))


def test_every_folder_with_code_is_a_package_of_the_wheel() -> None:
    # In a checkout lorafx/passes and lorafx/kernels are links to the folders at the root.
    found = {
        package_of(path.parent, root)
        for root, folder in FOLDERS.items()
        for path in folder.rglob("*.py")
        if not any(parent.is_symlink() for parent in path.parents)
    }
    assert sorted(found) == sorted(SETTINGS["packages"])
    assert all((folder_of(name) / "__init__.py").exists() for name in found)


def test_files_that_are_no_python_are_package_data() -> None:
    shipped = {
        path
        for name, patterns in SETTINGS["package-data"].items()
        for pattern in patterns
        for path in folder_of(name).glob(pattern)
        if path.is_file()
    }
    others = {
        path
        for folder in FOLDERS.values()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
        if not any(parent.is_symlink() for parent in path.parents)
    }
    assert sorted(others) == sorted(shipped)
