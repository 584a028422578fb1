"""The frames of a capture lie in one chunk of memory."""

from __future__ import annotations

import resource
from typing import Any

import pytest

from lorafx.call_stack import with_room


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def leaf(a: Any = 0, b: Any = 1, c: Any = 2, d: Any = 3, e: Any = 4) -> Any:
    """Its frame is no smaller than that of `looping`: it fits no better."""
    f, g, h, i, j = a, b, c, d, e
    return [f, g, h, i, j, [a, b, c, d, e]]


def looping(depth: int) -> None:
    for _ in range(1000):
        leaf()
    if depth:
        looping(depth - 1)


@pytest.mark.quick
def test_loops_at_any_depth_map_no_memory() -> None:
    """Without room, the thousand calls at the end of each chunk fault a thousand times."""
    before = page_faults()
    with_room(looping, 300)
    assert page_faults() - before < 500


@pytest.mark.quick
def test_what_it_gives_back_and_raises() -> None:
    assert with_room(divmod, 7, 2) == (3, 1)
    assert with_room(dict, a=1) == {"a": 1}
    with pytest.raises(ZeroDivisionError):
        with_room(divmod, 1, 0)
