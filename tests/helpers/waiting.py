"""Waiting for what will come. How long it takes is the machine's affair; only what never comes
fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

#: Seconds after which nothing comes any more, on whatever machine.
LONG = 900


def _looks(condition: Callable[[], object]) -> Iterator[float]:
    """How long to sleep before each further look: the longer it takes, the fewer there are."""
    start = time.monotonic()
    while not condition():
        waited = time.monotonic() - start
        assert waited < LONG, "it never came"
        yield min(max(0.005, waited / 20), 0.5)


def wait_until(condition: Callable[[], object]) -> None:
    for pause in _looks(condition):
        time.sleep(pause)


async def until(condition: Callable[[], object]) -> None:
    """`wait_until`, in a coroutine."""
    for pause in _looks(condition):
        await asyncio.sleep(pause)
