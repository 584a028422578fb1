"""Sparing Python's garbage collector the objects that last while many others are made.

A model of 10,000 modules has about a million objects. Each generation that fills up while its
sites, banks and marks are made walks over all of them: that was 60 % of the time (1.2 s of 2.0).
A capture makes as many, and much garbage: going through what was there before was a tenth of it,
and going again through what it had made itself another tenth at 32 layers. Nearly all that is young
when Python looks, after 700 objects, is still in use, so it looks more seldom.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: How many more objects there are to be in a block before its youngest are looked through.
_YOUNG = 100_000
#: Python counts what is frozen one by one: 0.1 s where a program of ten million objects has frozen
#: them. So it is asked for a thousandth of the time at most.
_ASKED_FOR = 1e-3
#: When to ask again, by `time.perf_counter`, after something was frozen.
_ask_again = 0.0


@contextmanager
def collection_paused() -> Iterator[None]:
    """Inside, no garbage is looked for; afterwards it is again where it was before."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def earlier_objects_spared() -> Iterator[None]:
    """Inside, garbage is looked for only among the objects that are made there, and less often.

    What outlasts one collection is spared, too, until the block ends: of the 6 million objects that
    a capture of 100 layers makes, 5 % are garbage that outlasts one, and to look for those was 3 %
    of its time.

    Where something is frozen already, by the program or by another such block, nothing is frozen.
    """
    with _looked_for_less_often():
        if _spare_survivors in gc.callbacks or _frozen():
            yield
            return
        gc.freeze()
        gc.callbacks.append(_spare_survivors)
        try:
            yield
        finally:
            gc.callbacks.remove(_spare_survivors)
            gc.unfreeze()


@contextmanager
def _looked_for_less_often() -> Iterator[None]:
    """Inside, garbage is looked for after `_YOUNG` new objects, unless the program has it looked
    for even less often, or never."""
    young, *older = gc.get_threshold()
    if not 0 < young < _YOUNG:
        yield
        return
    gc.set_threshold(_YOUNG, *older)
    try:
        yield
    finally:
        gc.set_threshold(young, *older)


def _spare_survivors(phase: str, info: dict[str, int]) -> None:
    if phase == "stop":
        gc.freeze()


def _frozen() -> bool:
    """Whether the program has frozen something, or had when Python was asked last."""
    global _ask_again
    begun = time.perf_counter()
    if begun < _ask_again:
        return True
    if not gc.get_freeze_count():
        return False
    asked = time.perf_counter()
    _ask_again = asked + (asked - begun) / _ASKED_FOR
    return True
