"""SIGINT at every place where Python looks for signals.

CPython runs signal handlers where a Python function begins, or goes on, and where a call of a C
function has returned. A profiler sees those very places, so that an action can be interrupted at
the first of them, the second, and so on until it gets through.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from waiting import LONG

import lorafx

_PACKAGE = str(Path(lorafx.__file__).parent)
_OURS: dict[CodeType, int] = {}


def _whose(code: CodeType) -> int:
    """2 for code of lorafx, 1 for that of context managers, which may run for it, else 0."""
    if code not in _OURS:
        own = code.co_filename.startswith(_PACKAGE)
        _OURS[code] = 2 if own else int(code.co_filename == contextlib.__file__)
    return _OURS[code]


def interrupted(place: int, action: Callable[[], Any]) -> tuple[bool, BaseException | None]:
    """Run `action` with a SIGINT at the place of this number, counted from 1.

    Returns:
        Whether there was such a place, and what the action raised.
    """
    seen = 0

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal seen
        if event not in ("call", "c_return"):
            return
        whose = _whose(frame.f_code)
        if whose == 1:
            back = frame.f_back
            whose = _whose(back.f_code) if back is not None else 0
        if whose != 2:
            return
        seen += 1
        if seen == place:
            sys.setprofile(None)
            signal.raise_signal(signal.SIGINT)

    sys.setprofile(profile)
    try:
        action()
    except BaseException as error:
        return seen >= place, error
    finally:
        sys.setprofile(None)
    return seen >= place, None


def every_place(
    action: Callable[[], Any], step: int = 1
) -> Iterator[tuple[int, BaseException | None]]:
    """Interrupt `action` at each `step`-th place in turn, as long as there is one; gives the place
    and what the action raised. That is None where it ran to its end: Python drops an interrupt that
    comes while it closes a generator."""
    place = 1
    while True:
        reached, error = interrupted(place, action)
        if not reached:
            if error is not None:
                raise error
            return
        yield place, error
        place += step


def elsewhere(action: Callable[[], Any], seconds: float = LONG) -> Any:
    """What `action` gives on another thread. Raises TimeoutError where it does not come back."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append((action(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        raise TimeoutError("waits for ever")
    result, error = found[0]
    if error is not None:
        raise error
    return result
