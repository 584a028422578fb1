"""Code that a signal must not interrupt, and locks that a fork must not inherit.

Python runs signal handlers between any two steps of the main thread, where that of SIGINT raises
KeyboardInterrupt. Most of lorafx records work in progress before it begins, so that unfinished work
is recognised. Code that restores state must run without interruption.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


def undisturbed(action: Callable[[], T]) -> T:
    """Return the result of a short `action`; handlers of signals run after it."""
    if threading.current_thread() is not threading.main_thread():
        return action()
    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
    arrived: list[tuple[int, FrameType | None]] = []
    done = False

    def defer(number: int, frame: FrameType | None) -> None:
        if done:
            handlers[number](number, frame)
        else:
            arrived.append((number, frame))

    try:
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            if callable(handler):
                handlers[number] = handler
                signal.signal(number, defer)
        return action()
    finally:
        done = True
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        for signum, frame in arrived:
            handlers[signum](signum, frame)


def free_after_fork(lock: threading.RLock) -> threading.RLock:
    """The lock for a child process: a new one if another thread of the parent held `lock`."""
    if not lock.acquire(blocking=False):
        return threading.RLock()
    lock.release()
    return lock


class Rollback:
    """The steps that undo the changes made so far; `len` counts them."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: Callable[[], object]) -> None:
        """Add a step that undoes one change. An interrupt may make it run twice."""
        self._steps.append(step)

    def run(self) -> None:
        """Undo all changes, the last one first, without interruption, and forget them."""
        undisturbed(self._run)

    def _run(self) -> None:
        while self._steps:
            self._steps[-1]()
            self._steps.pop()
