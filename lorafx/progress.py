"""Progress of long work: on a terminal, and in the log of `lorafx` when it has ended.

    lorafx: compiling graph 0 lora of LlamaForCausalLM, first call ...
    lorafx: compiling graph 0 lora of LlamaForCausalLM, first call: 12.3 s

Without a terminal, the first compilation of more than `PATIENCE` seconds is a line at level
WARNING, once in a process; level INFO has a line for each.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: Level INFO has a line for each piece of long work. `TORCH_LOGS="+lorafx"` shows it too.
LOG = logging.getLogger("lorafx")

#: Seconds of compiling before a warning, elsewhere than on a terminal.
PATIENCE = 5.0
_warned = False


class LongWork:
    """Running work named `what`, and its lines on `terminal`, None where standard error is none."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.terminal = None if sys.stderr is None or not sys.stderr.isatty() else sys.stderr
        self._start = time.perf_counter()
        self._shown = False

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def show(self, what: str | None = None) -> None:
        """Show its name on a terminal, from now on `what` if given."""
        self.what = what or self.what
        self._shown = True
        self._write(f"{self.what} ...")

    def end(self) -> None:
        """Show the time of work that was shown."""
        if self._shown:
            self._write(f"{self.what}: {self.seconds:.1f} s")
        self._shown = False

    def _write(self, line: str) -> None:
        if self.terminal is not None:
            print(f"lorafx: {line}", flush=True, file=self.terminal)


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Show `what` on a terminal while the block runs, or log it when it has ended."""
    work = LongWork(what)
    work.show()
    try:
        yield
    finally:
        work.end()
    if work.terminal is None:
        LOG.info("%s: %.1f s", what, work.seconds)


@contextmanager
def compiling(what: str) -> Iterator[LongWork]:
    """Around a capture and its compilation, which a terminal has by its `show`."""
    work = LongWork(what)
    watch = threading.Timer(PATIENCE, _warn, (work,))
    watch.daemon = True
    watched = work.terminal is None and _to_be_warned()
    if watched:
        watch.start()
    try:
        yield work
    finally:
        watch.cancel()
        if watched:
            watch.join()
        work.end()


def _to_be_warned() -> bool:
    return not _warned and LOG.isEnabledFor(logging.WARNING) and not LOG.isEnabledFor(logging.INFO)


def _warn(work: LongWork) -> None:
    global _warned
    if _to_be_warned():
        _warned = True
        LOG.warning(
            "lorafx is %s: %.0f s so far. The first call of each kind compiles, later ones do not; "
            'cm.warmup() does it ahead of requests. logging.getLogger("lorafx").setLevel("INFO") '
            'says more, and setLevel("ERROR") silences this',
            work.what,
            work.seconds,
        )
