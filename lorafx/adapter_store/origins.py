"""The files that an adapter was read from, and whether they are still the same.

origin = path, and of each file its number, size in bytes and time of modification in ns
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorafx.adapter_store.config_source import CONFIG_FILE
from lorafx.adapter_store.saved import AdapterSource, Saved
from lorafx.errors import CheckpointError

#: Files of these kinds in an adapter's folder may be read. What else lies there may change.
_KINDS = (".json", ".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Origin:
    """Where an adapter can be read again.

    Attributes:
        source: a folder, or a file, by its absolute path, and what it does not say itself.
        path: that path.
        files: (name, number of the inode, bytes, ns since 1970) of each file.
    """

    source: AdapterSource
    path: Path
    files: tuple[tuple[str, int, int, int], ...]

    @classmethod
    def of(cls, source: Any) -> Origin | None:
        """The origin of what is about to be read from `source`, or was; None for an adapter in
        memory or on the hub, and for what cannot be listed, which the reader says better."""
        asked = source if isinstance(source, AdapterSource) else AdapterSource(source)
        if isinstance(asked, OpenedSource):
            return asked.read_from()
        if not isinstance(asked.source, (str, os.PathLike)):
            return None
        path = Path(os.path.abspath(asked.source))
        try:
            return cls(replace(asked, source=path), path, _files(path))
        except (OSError, ValueError):  # ValueError: no path at all, with a null byte
            return None

    @property
    def nbytes(self) -> int:
        """Bytes on the disk."""
        return sum(size for _, _, size, _ in self.files)

    def check(self, name: str) -> None:
        """Raise CheckpointError where the files are not those that adapter `name` was read from."""
        try:
            found = dict.fromkeys(_files(self.path))
        except OSError as error:
            raise CheckpointError(self._lost(name, str(error))) from error
        now, before = ({each[0]: each for each in files} for files in (found, self.files))
        for file in [*before, *(file for file in now if file not in before)]:
            old, new = before.get(file), now.get(file)
            if old == new:
                continue
            if old is None or new is None:
                what = f"{file} is {'new' if old is None else 'gone'}"
            elif old[2] != new[2]:
                what = f"{file} had {old[2]} bytes and has {new[2]}"
            else:
                what = f"{file} was written again"
            raise CheckpointError(self._lost(name, what))

    def _lost(self, name: str, why: str) -> str:
        return (
            f"adapter {name!r} has to be read again, because LoraConfig(max_host_bytes=...) left "
            f"no room for it in host memory, and {self.path} is not what it was: {why}. "
            "load_adapter() loads what is there now"
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class OpenedSource(AdapterSource):
    """A source that was read already, for several models that each take their component of it.

    Attributes:
        saved: all that it holds.
        origin: as it was before that was read.
    """

    saved: Saved
    origin: Origin | None

    def read_from(self) -> Origin | None:
        """Where its component can be read again."""
        origin = self.origin
        if origin is None:
            return None
        return replace(origin, source=replace(origin.source, component=self.component))


def _files(path: Path) -> tuple[tuple[str, int, int, int], ...]:
    if path.is_dir():
        found = [each for each in path.iterdir() if each.suffix in _KINDS and each.is_file()]
    else:
        beside = path.parent / CONFIG_FILE
        found = [path, beside] if beside.is_file() else [path]
    return tuple((each.name, *stamp(each.stat())) for each in sorted(found))


def stamp(status: os.stat_result) -> tuple[int, int, int]:
    """By what a file that was written again differs: inode, bytes, ns since 1970."""
    return status.st_ino, status.st_size, status.st_mtime_ns
