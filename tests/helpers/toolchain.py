"""Whether C++ can be compiled here."""

from __future__ import annotations

import pytest

from lorafx.errors import LoweringError
from lorafx.kernels.cpu.compiler import find_compiler


def _has_compiler() -> bool:
    try:
        find_compiler()
    except LoweringError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not _has_compiler(), reason="needs a C++ compiler")
