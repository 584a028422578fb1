"""Progress of long work: on a terminal as it goes, and in the log of `lorafx` when it has ended."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_open = False  # a line stands on the terminal that has not ended


#: Level INFO has a line for each piece of long work. `TORCH_LOGS="+lorafx"` shows it too.
LOG = logging.getLogger("lorafx")


@contextmanager
def progress(what: str, *, logged: bool = True) -> Iterator[None]:
    """Show `what` on standard error while the block runs, with its time afterwards; without a
    terminal it is logged when it has ended, unless something else is.

    What is shown inside the block gets lines of its own.
    """
    global _open
    stream = sys.stderr
    start = time.perf_counter()
    if stream is None or not stream.isatty():
        yield
        if logged:
            LOG.info("%s: %.1f s", what, time.perf_counter() - start)
        return
    print("\n" * _open + f"lorafx: {what} ...", end="", flush=True, file=stream)
    _open = True
    try:
        yield
    finally:
        text = f"lorafx: {what}: {time.perf_counter() - start:.1f} s"
        print("\r" * _open + text, flush=True, file=stream)
        _open = False
