"""Of a table of cases, those that `make test` runs; `make test-all` runs all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def few(values: Iterable[Any], *kept: Any) -> list[Any]:
    """All values, of which those that are not kept are slow. A tuple is known by its first."""
    first = ((value, value[0] if isinstance(value, tuple) else value) for value in values)
    return [value if known in kept else _slow(value) for value, known in first]


def _slow(value: Any) -> Any:
    if isinstance(value, type(pytest.param())):
        return value
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
