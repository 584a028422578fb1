"""Libraries in Inductor's cache that a killed process left half written are named, removed and
compiled again. By torch alone, every later process fails with "file too short", or takes the CPU
for one without vector instructions.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorafx.torch_internals.entries import Required, private_names
from lorafx.torn import is_whole, warn_of

ENTRY = Required(
    use="libraries that a killed process left half written are compiled again",
    ended_by="Inductor, if it renamed a library when it is whole",
    refused="nothing: torch's own error comes",
)

with private_names():
    from torch._inductor import codecache, cpu_vec_isa
    from torch._inductor.codecache import LOCK_TIMEOUT, get_lock_dir
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    from torch.utils._filelock import FileLock

_MARK = "_lorafx_looks_for_torn_libraries"


def look_for_torn() -> None:
    """Let Inductor, where this torch is known, check libraries before it loads them."""
    load = vars(codecache.CppCodeCache).get("_load_library")
    if isinstance(load, classmethod) and not hasattr(load.__func__, _MARK):
        codecache.CppCodeCache._load_library = classmethod(_marked(_loading(load.__func__)))  # type: ignore[method-assign,assignment]
    isa = cpu_vec_isa.VecISA
    probe, check = (vars(isa).get(name) for name in ("_probe_load", "check_build"))
    if probe is not None and check is not None and not hasattr(check, _MARK):
        isa._probe_load = _probing(probe)  # type: ignore[method-assign,assignment]
        isa.check_build = _marked(_checking(check))  # type: ignore[method-assign]


def _marked(function: Callable[..., Any]) -> Callable[..., Any]:
    setattr(function, _MARK, True)
    return function


def _loading(load: Callable[..., Any]) -> Callable[..., Any]:
    def loaded(cls: Any, path: str, key: str) -> Any:
        library = Path(path)
        if key in cls.cache and key not in again and not is_whole(library):
            _remove(library, key)
            again.add(key)
            try:
                return cls.cache[key]()  # compiles what is not there, and loads it
            finally:
                again.discard(key)
        return load(cls, path, key)

    again: set[str] = set()
    return loaded


def _remove(library: Path, key: str) -> None:
    with FileLock(os.path.join(get_lock_dir(), f"{key}.lock"), timeout=LOCK_TIMEOUT):
        _unlink(library)


def _unlink(library: Path) -> None:
    inside = library.resolve().is_relative_to(Path(cache_dir()).resolve())
    if inside and library.exists() and not is_whole(library):
        warn_of(library)
        library.unlink()


def _probing(probe: Callable[..., bool]) -> Callable[..., bool | None]:
    def probed(self: Any, output_path: str) -> bool | None:
        """None where the library has to be compiled first."""
        _unlink(Path(output_path))  # under the lock of `check_build`
        return probe(self, output_path) if os.path.exists(output_path) else None

    return probed


def _checking(check: Callable[..., bool | None]) -> Callable[..., bool]:
    def checked(self: Any, code: str) -> bool:
        found = check(self, code)
        return bool(check(self, code) if found is None else found)

    return checked
