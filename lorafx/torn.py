"""Libraries of which only the beginning was written, because the linker was killed.

Linkers write the header that locates the last part, and most write it last. Loading half a library
is an error at best, and ends the process at worst.
"""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

from lorafx.errors import LorafxWarning

_ELF64 = b"\x7fELF\x02"
_HEADER = 64


def is_whole(library: Path) -> bool:
    """Whether a shared library is there from its first byte to its last."""
    try:
        with library.open("rb") as file:
            header, size = file.read(_HEADER), library.stat().st_size
    except FileNotFoundError:
        return False
    if not any(header[:4]):
        return False  # empty, or the header is not there yet
    if not header.startswith(_ELF64):
        return True  # of another system
    if len(header) < _HEADER:
        return False
    order = "<" if header[5] == 1 else ">"
    (sections,) = struct.unpack_from(f"{order}Q", header, 0x28)
    length, count = struct.unpack_from(f"{order}HH", header, 0x3A)
    return bool(sections + length * count <= size)


def warn_of(library: Path) -> None:
    """Warn that a library in a cache is not whole, and is compiled again."""
    warnings.warn(
        f"{library} is not whole, as when a process is killed while it compiles; it is compiled "
        "again",
        LorafxWarning,
        stacklevel=2,
    )
