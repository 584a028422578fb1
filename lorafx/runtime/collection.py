"""Python's garbage collection where it would walk over many objects that stay alive."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from contextlib import contextmanager

#: Python's third threshold where all objects are walked over rarely; its own is 10.
_RARELY = 199
#: Each so many blocks of `collection_of_new` collect all garbage.
_EACH = 10
_blocks = itertools.count(1)


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
def collection_of_young() -> Iterator[None]:
    """Walk rarely over all objects meanwhile: that took 0.4 s beside torch and transformers, and
    came among the first eager steps. Frozen, what dies between short blocks would live for ever:
    Python then counts its collections anew."""
    before = gc.get_threshold()
    raised = before[2] < _RARELY  # not by a block on another thread, nor by the caller
    try:
        if raised:
            gc.set_threshold(*before[:2], _RARELY)
        yield
    finally:
        if raised:
            gc.set_threshold(*before)


@contextmanager
def collection_of_new() -> Iterator[None]:
    """Collect only garbage that is made meanwhile, but once in a while all: an engine of
    transformers that stops collects twice, which beside a trainer took twice as long as its
    rollout."""
    if gc.get_freeze_count():  # by the caller, for whom it stays so
        yield
        return
    try:
        gc.freeze()
        yield
    finally:
        try:  # an interrupt does not leave it frozen
            if not next(_blocks) % _EACH:
                gc.unfreeze()
            gc.collect()  # the engine's pages, which its last collection still finds in use
        finally:
            gc.unfreeze()
