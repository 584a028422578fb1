"""One run of the compiler for each library, among threads and processes that share a cache.

The source beside the library is the lock: it is held (flock) by whoever compiles. Where that cannot
be had, for want of a file system that locks, or since somebody keeps it for too long, a library is
compiled twice, which is harmless: it is renamed into place.

A process that ends takes its compilers along. A forked child knows nothing of its parent's.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from lorafx.errors import LoweringError
from lorafx.torn import is_whole, warn_of

#: Seconds to wait for a library that somebody else compiles; most take one.
PATIENCE = 60.0

_LOCK = threading.Lock()
_RUNNING: set[subprocess.Popen[str]] = set()
_ended = False


def compiled(command: Sequence[str], source: str, library: Path) -> None:
    """Have `library` compiled from `source`.

    Args:
        command: the compiler and its flags.

    Raises:
        LoweringError: the compiler cannot be started, or refuses the source.
    """
    if is_whole(library):
        return
    with _held(library.with_suffix(".cpp")) as file:
        if not is_whole(library):
            if library.exists():
                warn_of(library)
            _compile(command, source, file, library)


@contextlib.contextmanager
def _held(path: Path) -> Iterator[TextIO]:
    """The file, made if need be, which nobody else holds at the same time, unless somebody keeps it
    for longer than PATIENCE."""
    deadline, pause = time.monotonic() + PATIENCE, 0.005
    while True:
        with path.open("a+") as file:
            busy = _lock(file)
            # Whoever held it may have removed it.
            if time.monotonic() > deadline or (not busy and _is_at(file, path)):
                try:
                    yield file
                finally:
                    # For a forked child too, which has inherited it.
                    with contextlib.suppress(OSError):
                        fcntl.flock(file, fcntl.LOCK_UN)
                return
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


def _lock(file: TextIO) -> bool:
    """Lock the file, unless somebody else has; true then."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there are no locks here
        return False
    return False


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _compile(command: Sequence[str], source: str, text: TextIO, library: Path) -> None:
    try:
        text.seek(0)
        if text.read() != source:
            text.truncate(0)
            text.write(source)
            text.flush()
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            built = Path(scratch, library.name)
            _run([*command, text.name, "-o", str(built)])
            built.replace(library)
    except BaseException:
        Path(text.name).unlink(missing_ok=True)
        raise


def _run(command: Sequence[str]) -> None:
    """Run the compiler, in a group of processes of its own: it starts others."""
    try:
        with _LOCK:
            if _ended:
                raise LoweringError("Python is shutting down")
            process = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            _RUNNING.add(process)
    except OSError as error:
        raise LoweringError(f"{command[0]} could not be started: {error}") from error
    try:
        _, errors = process.communicate()
    except BaseException:
        _stop(process)
        raise
    finally:
        _RUNNING.discard(process)
    if process.returncode:
        raise LoweringError(f"{command[0]} refused a generated kernel:\n{errors[-2000:]}")


def _stop(process: subprocess.Popen[str]) -> None:
    # GCC removes its temporary files on SIGTERM.
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)


@atexit.register
def _end() -> None:
    """Stop the compilers."""
    global _ended
    with _LOCK:
        _ended = True
        running = list(_RUNNING)
    for process in running:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)


def _after_fork() -> None:
    """The threads are the parent's, and so are their compilers."""
    global _LOCK
    _LOCK = threading.Lock()
    _RUNNING.clear()


os.register_at_fork(after_in_child=_after_fork)
