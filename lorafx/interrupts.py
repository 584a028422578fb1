"""Code that a signal must not interrupt, and locks that a fork must not inherit.

Python runs signal handlers between any two steps of the main thread, and that of SIGINT raises
KeyboardInterrupt there. Most of lorafx records work in progress before it begins, so that anything
left half done is recognised. Code that restores state runs whole.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


def undisturbed(action: Callable[[], T]) -> T:
    """What a short `action` returns; handlers of signals that come meanwhile run after it."""
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
    """`lock` for a child process: a new lock where a thread that the child lacks held it."""
    if not lock.acquire(blocking=False):
        return threading.RLock()
    lock.release()
    return lock


class Rollback:
    """How to undo the changes so far, a step for each. `bool` and `len` count them."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: Callable[[], object]) -> None:
        """`step` undoes one change. It may run twice."""
        self._steps.append(step)

    def run(self) -> None:
        """Undo everything, the last change first, whatever signals come; once."""
        undisturbed(self._run)

    def _run(self) -> None:
        while self._steps:
            self._steps[-1]()
            self._steps.pop()
