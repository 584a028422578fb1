"""Whether C++ can be compiled here, and how it is where it cannot."""

from __future__ import annotations

from typing import NoReturn

import pytest

from lorafx.errors import LoweringError
from lorafx.kernels.cpu.compiler import find_compiler


def _has_compiler() -> bool:
    try:
        find_compiler()
    except LoweringError:
        return False
    return True


def no_compiler() -> NoReturn:
    """In the place of `best_isa`."""
    raise LoweringError("no C++ compiler")


needs_compiler = pytest.mark.skipif(not _has_compiler(), reason="needs a C++ compiler")
