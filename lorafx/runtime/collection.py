"""Pauses Python's garbage collection where many objects are made that stay alive."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """Collect no garbage meanwhile, which would walk over all of them: for a model of 10,000
    modules that took 1.2 s of 2.0, and beside the loading of a graph, where it walks over torch's
    own, as long as the loading."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
