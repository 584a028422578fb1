"""Progress of long work on a terminal; silent anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Show `what` on standard error while the block runs, with its time afterwards."""
    stream = sys.stderr
    if stream is None or not stream.isatty():
        yield
        return
    start = time.perf_counter()
    print(f"lorafx: {what} ...", end="", flush=True, file=stream)
    try:
        yield
    finally:
        print(f"\rlorafx: {what}: {time.perf_counter() - start:.1f} s", flush=True, file=stream)
