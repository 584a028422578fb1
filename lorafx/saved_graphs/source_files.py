"""The files that a graph's code was traced from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import CodeType


def source_files(codes: Iterable[CodeType]) -> dict[str, str]:
    """A hash of each file that some of the code stands in. Code without a file is told by its
    bytecode (`fingerprints.py`)."""
    found: dict[str, str] = {}
    for name in sorted({code.co_filename for code in codes}):
        path = Path(name)
        if path.is_file():
            found[name] = _hash(path)
    return found


def changed_file(files: Mapping[str, str]) -> str | None:
    """The first of these files that is not as it was."""
    for name, was in files.items():
        path = Path(name)
        if not path.is_file() or _hash(path) != was:
            return name
    return None


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
