"""Python's garbage collection where it would walk over many objects that stay alive."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """Collect no garbage meanwhile, which would walk over all of them: for a model of 10,000
    modules that took 1.2 s of 2.0, and beside the loading of a graph, where it walks over torch's
    own, as long as the loading. Of eager decode steps of 0.1 s, one in some twenty took 0.4 s."""
    enabled = gc.isenabled()
    try:
        gc.disable()  # an interrupt behind it does not leave it so
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def collection_of_new(*, at_end: bool = False) -> Iterator[None]:
    """Collect only garbage that is made meanwhile, `at_end` all of that. A collection of everything
    took 0.4 s beside torch and transformers, and came among the first eager steps; an engine of
    transformers that stops has two, which beside a trainer took twice as long as its rollout."""
    frozen = gc.get_freeze_count()  # by the caller, for whom it stays so
    try:
        if not frozen:
            gc.freeze()
        yield
    finally:
        if not frozen:
            if at_end:
                gc.collect()
            gc.unfreeze()
