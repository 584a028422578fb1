"""Progress of long work on a terminal; silent anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_open = False  # a line stands on the terminal that has not ended


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Show `what` on standard error while the block runs, with its time afterwards.

    What is shown inside the block gets lines of its own.
    """
    global _open
    stream = sys.stderr
    if stream is None or not stream.isatty():
        yield
        return
    start = time.perf_counter()
    print("\n" * _open + f"lorafx: {what} ...", end="", flush=True, file=stream)
    _open = True
    try:
        yield
    finally:
        text = f"lorafx: {what}: {time.perf_counter() - start:.1f} s"
        print("\r" * _open + text, flush=True, file=stream)
        _open = False
