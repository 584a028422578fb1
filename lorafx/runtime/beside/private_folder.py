"""Folders through which processes beside hand graphs over, where no folder was chosen for them."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import weakref
from contextlib import suppress
from pathlib import Path

#: How the names of private folders begin, and the age in seconds from which one may be left over.
_PREFIX, _NEW = "lorafx-graphs-", 60.0


class PrivateFolder(os.PathLike[str]):
    """A folder of this process alone, made when it is needed and removed with this object; another
    one in a child process. A process that is killed removes none: the process beside does, or the
    next process that makes one."""

    def __init__(self) -> None:
        self._made: tuple[int, str] | None = None

    def __fspath__(self) -> str:
        if self._made is None or self._made[0] != os.getpid():
            _remove_left()
            self._made = os.getpid(), tempfile.mkdtemp(prefix=_PREFIX)
            weakref.finalize(self, _remove, *self._made, _locked(self._made[1]))
        return self._made[1]

    def keep(self, folder: str) -> None:
        """Use the folder of the parent, which removes it."""
        self._made = os.getpid(), folder


def _remove(owner: int, folder: str, lock: int | None) -> None:
    if owner == os.getpid():
        shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        os.close(lock)


def _locked(folder: str | Path) -> int | None:
    """A descriptor that locks a folder until it is closed, as it is when its process and those
    beside it have ended; None if another process has the lock, or there are none."""
    with suppress(ImportError, OSError):
        import fcntl

        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return number
        except OSError:
            os.close(number)
    return None


def _remove_left() -> None:
    """Remove the folders of this user's processes that have ended without doing so."""
    with suppress(OSError):
        for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
            status = folder.lstat()
            new = time.time() < status.st_mtime + _NEW  # it may not be locked yet
            if status.st_uid == os.getuid() and not new and (lock := _locked(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)
