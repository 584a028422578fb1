"""The generated kernels of one kind, each of which is compiled, loaded and entered once.

    GENERATED = Kernels(loss, source, enter)
    GENERATED.ready(spec)    what `enter` made of the library of `spec`; None where there is none

Where a source does not compile, or its library does not load, the slower way that `loss` names is
taken, after a warning that is said once.
"""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from lorafx.errors import LorafxWarning, LoweringError
from lorafx.kernels.cpu.compiler import (
    Isa,
    best_isa,
    compile_library,
    load_library,
    torch_function,
)

S = TypeVar("S")
T = TypeVar("T")

#: Lanes of the narrowest vectors for which products and attention were measured.
WIDE = 8
_NOT_TRIED: Any = object()
#: Held while kernels are compiled and registered.
LOCK = threading.RLock()


class Kernels(Generic[S, T]):
    """The generated kernels of one kind, by spec.

    Args:
        loss: what is lost without a kernel, with which the warning begins.
        source: the C++ text of the kernel of a spec, for an instruction set.
        enter: makes the kernel in a library known to what calls it; returns a true value, with
            which `ready` answers.
        flags: the compiler's flags for an instruction set.
        lanes: the lanes of the narrowest vectors for which kernels are generated.
    """

    def __init__(
        self,
        loss: str,
        source: Callable[[S, Isa], str],
        enter: Callable[[S, Isa, ctypes.CDLL], T],
        *,
        flags: Callable[[Isa], tuple[str, ...]] = lambda isa: isa.flags,
        lanes: int = 1,
    ) -> None:
        self._loss, self._source, self._enter = loss, source, enter
        self._flags, self._lanes = flags, lanes
        self._tried: dict[tuple[S, Isa | None], T | None] = {}
        self._said = False

    def ready(self, spec: S, isa: Isa | None = None, *, again: bool = False) -> T | None:
        """What `enter` returned for `spec` and the best instruction set, or `isa`; None if no
        kernel is generated for it, or none compiles here. It is tried once, or, with `again`, until
        there is one."""
        key = spec, isa
        found = self._tried.get(key, _NOT_TRIED)
        if found is _NOT_TRIED or (found is None and again):
            with LOCK:
                found = self._tried[key] = self._tried.get(key) or self._try(spec, isa)
        return found

    def has(self, spec: S) -> bool:
        return self._tried.get((spec, None)) is not None

    def _try(self, spec: S, isa: Isa | None) -> T | None:
        try:
            isa = isa or best_isa()
            return self.load(spec, isa) if self.generates(isa) else None
        except LoweringError as error:
            if not self._said:
                self._said = True
                warnings.warn(f"{self._loss}: {error}", LorafxWarning, stacklevel=4)
            return None

    def generates(self, isa: Isa) -> bool:
        """Whether kernels are generated for `isa`."""
        return isa.lanes >= self._lanes

    def compile(self, spec: S, isa: Isa) -> Path:
        return compile_library(self._source(spec, isa), self._flags(isa))

    def load(self, spec: S, isa: Isa) -> T:
        """Compile, load and enter the kernel of `spec` for `isa`. Raises LoweringError."""
        return self._enter(spec, isa, load_library(self.compile(spec, isa)))

    def forget(self) -> None:
        """Try each kernel anew, and warn anew."""
        self._tried.clear()
        self._said = False


def with_parallel(spec: Any, isa: Isa, library: ctypes.CDLL) -> tuple[Any, int]:
    """For kernels that Python calls: the kernel, and torch's function that shares out its work."""
    return library.lorafx_kernel, torch_function("torch_parallel_for")
