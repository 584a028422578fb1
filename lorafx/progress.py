"""Progress of long work: on a terminal as it goes, and in the log of `lorafx` when it has ended.

    lorafx: compiling graph 0 lora of LlamaForCausalLM, first call: 12.3 s

Without a terminal, the first compilation of more than `PATIENCE` seconds is a line at level
WARNING, once in a process; level INFO has a line for each.
"""

from __future__ import annotations

import logging
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: Level INFO has a line for each piece of long work. `TORCH_LOGS="+lorafx"` shows it too.
LOG = logging.getLogger("lorafx")

#: Seconds of compiling before a warning, elsewhere than on a terminal.
PATIENCE = 5.0
#: Seconds after which the line of a terminal is written anew.
_TICK = 1.0

_LOCK = threading.Lock()  # of lines on the terminal
_warned = False


class LongWork:
    """Running work named `what`, and its line on `terminal`, None where standard error is none."""

    _open: LongWork | None = None  # whose line has not ended

    def __init__(self, what: str) -> None:
        self.what = what
        self.terminal = None if sys.stderr is None or not sys.stderr.isatty() else sys.stderr
        self._start = time.perf_counter()
        self._length = 0  # of its line, 0 before it is shown
        self._ended = False

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def show(self, what: str | None = None) -> None:
        """Show on a terminal its name, `what` from now on if given, and its time so far."""
        self.what = what or self.what
        self._write(f"lorafx: {self.what} ... {self.seconds:.0f} s", ends=False)

    def end(self) -> None:
        if self._length:
            self._write(f"lorafx: {self.what}: {self.seconds:.1f} s", ends=True)
        self._ended = True

    def watch(self, ended: threading.Event) -> None:
        """Until it has ended, write its line anew, or warn of it."""
        if self.terminal is None:
            if not ended.wait(PATIENCE):
                _warn(self)
            return
        while not ended.wait(_TICK):
            self.show()

    def _write(self, line: str, *, ends: bool) -> None:
        with _LOCK:
            if self.terminal is None or self._ended:
                return
            line = line[: shutil.get_terminal_size().columns - 1]
            before = LongWork._open
            start = "" if before is None else "\r" if before is self else "\n"
            text = start + line.ljust(self._length) + "\n" * ends
            print(text, end="", flush=True, file=self.terminal)
            self._length, LongWork._open = len(line), None if ends else self


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
    """Around a capture and its compilation; a terminal has its line after a second, or `show`."""
    work, ended = LongWork(what), threading.Event()
    watch = threading.Thread(target=work.watch, args=(ended,), daemon=True)
    watched = work.terminal is not None or _to_be_warned()
    if watched:
        watch.start()
    try:
        yield work
    finally:
        if watched:
            ended.set()
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
