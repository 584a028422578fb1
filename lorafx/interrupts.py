"""Code that a signal must not interrupt, and locks that a fork must not inherit.

Python runs signal handlers between any two steps of the main thread, and the one of SIGINT raises
KeyboardInterrupt there. Most of lorafx is safe from that, because it records work in progress
before it begins, so that anything left half done is recognised. Code that restores state runs
whole.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


def undisturbed(action: Callable[[], T]) -> T:
    """What `action` returns; handlers of signals that come meanwhile run after it.

    For what is short: slots and weights that are put back. Only the main thread runs handlers, so
    on any other one there is nothing to wait for.
    """
    if threading.current_thread() is not threading.main_thread():
        return action()
    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
    came: list[tuple[int, FrameType | None]] = []
    done = False

    def wait(number: int, frame: FrameType | None) -> None:
        if done:
            handlers[number](number, frame)
        else:
            came.append((number, frame))

    try:
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            if callable(handler):
                handlers[number] = handler
                signal.signal(number, wait)
        return action()
    finally:
        done = True
        for kind, handler in handlers.items():
            signal.signal(kind, handler)
        for kind, frame in came:
            handlers[kind](kind, frame)


def free_after_fork(lock: threading.RLock) -> threading.RLock:
    """The lock that a child process uses in place of `lock`: itself, but where another thread of
    the parent held it, which is none of the child's."""
    if not lock.acquire(blocking=False):
        return threading.RLock()
    lock.release()
    return lock


class Rollback:
    """How to put back what has been changed so far, a step for each change. `bool` and `len` tell
    how many there are."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: Callable[[], object]) -> None:
        """`step` puts one thing back. It may run twice."""
        self._steps.append(step)

    def run(self) -> None:
        """Put everything back, the last change first, whatever signals come; once."""
        undisturbed(self._run)

    def _run(self) -> None:
        while self._steps:
            self._steps[-1]()
            self._steps.pop()
