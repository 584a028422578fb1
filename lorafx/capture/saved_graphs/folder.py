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
from pathlib import Path

from lorafx.errors import ConfigError
from lorafx.kernels.cpu.compiler import cache_folder

_MAGIC = b"lorafx graph 2\n"


class BrokenFile(Exception):
    """A file has unexpected contents or another owner."""


def default_folder() -> Path:
    """LORAFX_CACHE_DIR, or a folder beside the compiled kernels in Inductor's cache."""
    return cache_folder() / "graphs"


def folder_of(option: str | bool | os.PathLike[str]) -> Path:
    """The folder of `Options.cache`, made if absent; ConfigError unless private to the user."""
    path = default_folder() if isinstance(option, bool) else Path(option).expanduser()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat() if path == default_folder() else path.stat()
    except OSError as error:
        raise ConfigError(f"Options.cache: {path} cannot be a folder: {error}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"Options.cache: {path} is not a folder")
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        raise ConfigError(
            f"Options.cache: {path} belongs to user {status.st_uid}, not to you ({os.getuid()}). "
            "Loading a saved graph runs code, so the folder has to be your own"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"Options.cache: others may write to {path} (mode {status.st_mode & 0o777:o}). Loading "
            f"a saved graph runs code; chmod 700 {path}, or name another folder"
        )
    return path


def write(folder: Path, key: str, body: bytes) -> Path:
    """Write a graph into the folder, atomically, and return its path."""
    subfolder = folder / key
    subfolder.mkdir(mode=0o700, exist_ok=True)
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


def _checksum(key: str, body: bytes) -> str:
    return hashlib.sha256(key.encode() + b"\0" + body).hexdigest()


def files(folder: Path, key: str) -> list[Path]:
    """The saved graphs of a key, oldest first."""
    dated = []
    for path in (folder / key).glob("*.graph"):
        with contextlib.suppress(OSError):  # removed meanwhile
            dated.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(dated)]


def read(path: Path, key: str) -> bytes:
    """The body of a file that was saved for `key`. Raises BrokenFile for any other file."""
    try:
        if hasattr(os, "getuid") and path.stat().st_uid != os.getuid():
            raise BrokenFile("it belongs to another user")
        data = path.read_bytes()
    except OSError as error:
        raise BrokenFile(str(error)) from error
    with contextlib.suppress(OSError):
        os.utime(path)
    start = len(_MAGIC) + 2 * hashlib.sha256().digest_size
    if data[:start] != _MAGIC + _checksum(key, data[start:]).encode():
        raise BrokenFile("its contents do not match its checksum")
    return data[start:]
