"""The folder of saved graphs, `folder / key / digest.graph`.

A file is a checksum and a pickle. Pickles can run code, so folder and files must belong to the user
alone. Files are renamed into place, so processes may share the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
import time
from pathlib import Path

from lorafx.config import CACHE
from lorafx.errors import ConfigError
from lorafx.kernels.cpu.compiler import cache_folder

#: The value of `Options.cache` for the default folder where it is safe and has room.
AUTO = "auto"

_MAGIC = b"lorafx graph 2\n"
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_HALF_WRITTEN = 3600.0  # seconds after which a file that was never renamed is nobody's


class BrokenFile(Exception):
    """A file has unexpected contents or another owner."""


def default_folder() -> Path:
    """LORAFX_CACHE_DIR, or a folder beside the compiled kernels in Inductor's cache."""
    return cache_folder() / "graphs"


def most_bytes() -> int:
    """How much the files of "auto" may take: LORAFX_CACHE_BYTES, or 1 GiB. 0 switches it off."""
    text = os.environ.get("LORAFX_CACHE_BYTES", str(2**30))
    if not text.isdecimal():
        raise ConfigError(f"LORAFX_CACHE_BYTES must be a number of bytes, got {text!r}")
    return int(text)


def folder_of(option: str | bool | os.PathLike[str]) -> Path:
    """The folder of `Options.cache`, made if absent; ConfigError unless private to the user. For
    "auto" nobody else may be able to replace a folder above it either."""
    default = option is True or option == AUTO
    if option == AUTO and not most_bytes():
        raise ConfigError("LORAFX_CACHE_BYTES is 0")
    try:
        path = (
            default_folder()
            if default
            else Path(os.fspath(str(option) if isinstance(option, bool) else option)).expanduser()
        )
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat() if default else path.stat()
        parents = [(item, item.lstat()) for item in path.resolve().parents]
    except OSError as error:
        raise _refusal(f"no folder can be made: {error}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise _refusal(f"{path} is not a folder")
    if flaw := _flaw(status):
        raise _refusal(
            f"{path} {flaw}. Loading a saved graph runs code, so the folder has to be your own; "
            f"chmod 700 {path}, or name another folder"
        )
    for parent, status in parents if option == AUTO else ():
        if flaw := _flaw(status, of_parent=True):
            raise _refusal(
                f"{parent}, above {path}, {flaw}; chmod go-w {parent}, or set LORAFX_CACHE_DIR to "
                "another folder"
            )
    return path


def _refusal(why: str) -> ConfigError:
    return ConfigError(f"{CACHE}: {why}").naming(CACHE)


def _flaw(status: os.stat_result, *, of_parent: bool = False) -> str:
    """Why others could change a file or folder of this status, as a predicate; "" if they cannot.
    A parent may be root's, or one like /tmp, where nobody renames the folders of others."""
    if hasattr(os, "getuid"):
        owners = (os.getuid(), 0) if of_parent else (os.getuid(),)
        if status.st_uid not in owners:
            return f"belongs to user {status.st_uid}, not to you ({os.getuid()})"
    if status.st_mode & _WRITABLE_BY_OTHERS and not (of_parent and status.st_mode & stat.S_ISVTX):
        return f"can be changed by others (mode {status.st_mode & 0o777:o})"
    return ""


def write(folder: Path, key: str, body: bytes) -> Path:
    """Write a graph into the folder, atomically, and return its path."""
    subfolder = folder / key
    subfolder.mkdir(mode=0o700, exist_ok=True)
    if flaw := _flaw(subfolder.lstat()):
        raise PermissionError(f"{subfolder} {flaw}")
    checksum = _checksum(key, body)
    path = subfolder / f"{checksum[:24]}.graph"
    descriptor, scratch = tempfile.mkstemp(".tmp", dir=subfolder)
    try:
        with open(descriptor, "wb") as file:
            file.write(_MAGIC + checksum.encode() + body)
        os.replace(scratch, path)
    except BaseException:  # a full disk, an interrupt
        with contextlib.suppress(OSError):
            os.unlink(scratch)
        raise
    return path


def trim(folder: Path, most: int) -> None:
    """Remove files, the one whose last use is longest ago first, until all take at most `most`
    bytes, and what processes left that were killed while they wrote."""
    statuses = []
    for path in folder.glob("*/*"):
        with contextlib.suppress(OSError):  # removed meanwhile
            statuses.append((path, path.lstat()))
    graphs = (item for item in statuses if item[0].suffix == ".graph")
    saved = sorted(graphs, key=lambda item: item[1].st_mtime)
    total = sum(status.st_size for _, status in saved)
    removed = [
        path
        for path, status in statuses
        if path.suffix == ".tmp" and status.st_mtime < time.time() - _HALF_WRITTEN
    ]
    for path, status in saved:
        if total <= most:
            break
        total -= status.st_size
        removed.append(path)
    for path in removed:
        with contextlib.suppress(OSError):
            path.unlink()
            path.parent.rmdir()  # if it was the last of its key


def _checksum(key: str, body: bytes) -> str:
    return hashlib.sha256(key.encode() + b"\0" + body).hexdigest()


def files(folder: Path, key: str) -> list[Path]:
    """The saved graphs of a key, oldest first; none where others may write to their folder."""
    dated = []
    with contextlib.suppress(FileNotFoundError):
        if _flaw((folder / key).lstat()):
            return []
    for path in (folder / key).glob("*.graph"):
        with contextlib.suppress(OSError):  # removed meanwhile
            dated.append((path.lstat().st_mtime, path))
    return [path for _, path in sorted(dated)]


def read(path: Path, key: str) -> bytes:
    """The body of a file that was saved for `key`. Raises BrokenFile for any other file, for one
    that others may write to, and for a link."""
    try:
        # The status is that of what is read: neither a link is followed nor a pipe waited for.
        extra = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | extra)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BrokenFile("it is not a file")
            if flaw := _flaw(status):
                raise BrokenFile(f"it {flaw}")
            data = file.read()
    except OSError as error:
        raise BrokenFile(str(error)) from error
    with contextlib.suppress(OSError):
        os.utime(path)
    start = len(_MAGIC) + 2 * hashlib.sha256().digest_size
    if data[:start] != _MAGIC + _checksum(key, data[start:]).encode():
        raise BrokenFile("its contents do not match its checksum")
    return data[start:]
