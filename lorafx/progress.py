"""Progress of long work: shown on a terminal, and logged by `lorafx` when the work has ended.

    lorafx: compiling graph 0 lora of LlamaForCausalLM, first call ...
    lorafx: compiling graph 0 lora of LlamaForCausalLM, first call: 12.3 s

Without a terminal, the first compilation in a process that takes more than `PATIENCE` seconds is
logged at level WARNING; level INFO has a line for each compilation.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: Has a line at level INFO for each piece of long work; `TORCH_LOGS="+lorafx"` shows them too.
LOG = logging.getLogger("lorafx")

#: Seconds of compiling before a warning, if there is no terminal.
PATIENCE = 5.0
_warned = False


class LongWork:
    """Running work and its lines on `terminal`, which is None if standard error is no terminal."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.terminal = None if sys.stderr is None or not sys.stderr.isatty() else sys.stderr
        self._start = time.perf_counter()
        self._shown = False

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def show(self, name: str | None = None) -> None:
        """Show the work on a terminal, by a new name if one is given."""
        self.name = name or self.name
        self._shown = True
        self._write(f"{self.name} ...")

    def end(self) -> None:
        """Show the time of the work, if it was shown."""
        if self._shown:
            self._write(f"{self.name}: {self.seconds:.1f} s")
        self._shown = False

    def _write(self, line: str) -> None:
        if self.terminal is not None:
            print(f"lorafx: {line}", flush=True, file=self.terminal)


@contextmanager
def progress(name: str) -> Iterator[None]:
    """Shows the work of the block on a terminal, or logs it when it has ended."""
    work = LongWork(name)
    work.show()
    try:
        yield
    finally:
        work.end()
    if work.terminal is None:
        LOG.info("%s: %.1f s", name, work.seconds)


@contextmanager
def compiling(name: str) -> Iterator[LongWork]:
    """Reports a capture and its compilation in the block, which calls `show` of the work."""
    work = LongWork(name)
    watch = threading.Timer(PATIENCE, _warn, (work,))
    watch.daemon = True
    watched = work.terminal is None and _warning_is_due()
    if watched:
        watch.start()
    try:
        yield work
    finally:
        watch.cancel()
        if watched:
            watch.join()
        work.end()


def _warning_is_due() -> bool:
    return not _warned and LOG.isEnabledFor(logging.WARNING) and not LOG.isEnabledFor(logging.INFO)


def _warn(work: LongWork) -> None:
    global _warned
    if _warning_is_due():
        _warned = True
        LOG.warning(
            "lorafx is %s: %.0f s so far. The first call of each kind compiles, later ones do not; "
            'cm.warmup() does it ahead of requests. logging.getLogger("lorafx").setLevel("INFO") '
            'says more, and setLevel("ERROR") silences this',
            work.name,
            work.seconds,
        )
