"""The folder of saved graphs, `folder / key / digest.graph`.

A file is a checksum and a pickle. Pickles can run code, so folder and files belong to this user
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
    """A file with unexpected contents or owner."""


def default_folder() -> Path:
    """LORAFX_CACHE_DIR, or a folder beside the compiled kernels in Inductor's cache."""
    return cache_folder() / "graphs"


def folder_of(option: str | bool) -> Path:
    """The folder of `Options.cache`, created if absent; ConfigError unless private to the user."""
    path = default_folder() if isinstance(option, bool) else Path(option).expanduser()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat() if path == default_folder() else path.stat()
    except OSError as error:
        raise ConfigError(f"Options.cache: {path} cannot be a folder: {error}") from error
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"Options.cache: {path} is not a folder")
    if hasattr(os, "getuid") and found.st_uid != os.getuid():
        raise ConfigError(
            f"Options.cache: {path} belongs to user {found.st_uid}, not to you ({os.getuid()}). "
            "Loading a saved graph runs code, so the folder has to be your own"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"Options.cache: others may write to {path} (mode {found.st_mode & 0o777:o}). Loading "
            f"a saved graph runs code; chmod 700 {path}, or name another folder"
        )
    return path


def write(folder: Path, key: str, body: bytes) -> Path:
    """Put a graph into the folder, atomically."""
    home = folder / key
    home.mkdir(mode=0o700, exist_ok=True)
    checksum = _checksum(key, body)
    path = home / f"{checksum[:24]}.graph"
    number, scratch = tempfile.mkstemp(".tmp", dir=home)
    try:
        with open(number, "wb") as file:
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
    found = []
    for path in (folder / key).glob("*.graph"):
        with contextlib.suppress(OSError):  # removed meanwhile
            found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found)]


def read(path: Path, key: str) -> bytes:
    """The body of a file saved for `key`; raises BrokenFile for other contents or owners."""
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
