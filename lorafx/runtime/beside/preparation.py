"""What the loading of a graph needs, which a thread prepares: no call waits for it."""

from __future__ import annotations

import importlib
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorafx.program.program import Program

_MODULES = ("lorafx.capture.backend", "lorafx.capture.saved_graphs.saved_graphs")
_preparation: threading.Thread | None = None


def preparing() -> bool:
    return _preparation is not None and _preparation.is_alive()


def is_prepared() -> bool:
    return not preparing() and all(name in sys.modules for name in _MODULES)


def prepare(action: Callable[[], object]) -> None:
    """Have `action` run in a thread, after earlier ones."""
    global _preparation
    before = _preparation

    def run() -> None:
        if before is not None:
            before.join()
        with suppress(Exception):  # a call that needs it raises it again
            action()

    thread = threading.Thread(target=run, name="lorafx prepares", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the process has as many threads as it may
        run()
    else:
        _preparation = thread


def import_backend() -> None:
    for name in _MODULES:
        importlib.import_module(name)


def prepare_files(program: Program, paths: Iterable[Path]) -> None:
    reference = weakref.ref(program)  # the thread keeps no model alive

    def action() -> None:
        import_backend()
        from lorafx.capture.saved_graphs.saved_graphs import prepare

        for path in paths:
            if (alive := reference()) is not None:
                prepare(alive, path)

    prepare(action)


def _wait_for_preparation() -> None:
    """A lock that the thread holds at a fork would never be free in the child."""
    if _preparation is not None and _preparation is not threading.current_thread():
        _preparation.join()


os.register_at_fork(before=_wait_for_preparation)
