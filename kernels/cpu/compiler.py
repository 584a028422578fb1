"""From C++ text to a loaded library, by the compiler that Inductor uses, with a cache on disk.

    path = cache / sha256(source, command, compiler's version).so

A library is renamed into place when it is complete, so processes may share the cache; those that
need the same one at the same time each compile it.

Sources include no torch header and link nothing, so a library is valid for every torch version and
takes about a second. Every failure is a LoweringError.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lorafx.errors import LoweringError
from lorafx.torch_internals.cpu import has_avx512_bf16, has_matrix_tiles

BASE_FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-w"),
    # One rounding per multiply-add in each tile shape, on which the bit-equality of rows depends.
    *("-ffp-contract=fast", "-fno-math-errno"),
)


@dataclass(frozen=True)
class Isa:
    """An instruction set: compiler flags and the shapes that fill its registers.

    Attributes:
        lanes: float32 lanes of a vector.
        tile, planes, pairs: rows of a full tile, and the planes of A or pairs of column vectors of
            B with it; tile · planes, and tile · 2 · pairs, accumulators fit into the registers.
        f16c, dpbf16, matrix_tiles: whether conversions from float16, dot products of bfloat16 and
            of bytes, and products of matrix tiles in bfloat16 (AMX) are instructions.
        locality: with which a weight is prefetched: 3 for the first cache, 2 for the second, which
            takes 0.83 of the first's time for one row of float32 and as long for eight (Sapphire
            Rapids, the kind of CPU that has matrix tiles).
    """

    name: str
    flags: tuple[str, ...]
    lanes: int
    tile: int
    planes: int
    pairs: int
    f16c: bool = False
    dpbf16: bool = False
    matrix_tiles: bool = False
    locality: int = 3

    @property
    def streams(self) -> int:
        """In which few rows read a weight: 4 take 0.8 to 0.93 of one's time (Zen 3, not 4, 5)."""
        return 1 if self.lanes == 16 else 4


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw")
_BF16 = (*_AVX512, "-mavx512vnni", "-mavx512bf16")
_AMX = (*_BF16, "-mamx-tile", "-mamx-bf16")
ISAS = (
    Isa("amx_bf16", _AMX, 16, 6, 4, 2, f16c=True, dpbf16=True, matrix_tiles=True, locality=2),
    Isa("avx512_bf16", _BF16, 16, 6, 4, 2, f16c=True, dpbf16=True),
    Isa("avx512", _AVX512, 16, 6, 4, 2, f16c=True),
    Isa("avx2", _AVX2, 8, 4, 2, 1, f16c=True),
    Isa("portable", (), 4, 4, 2, 1),
)


def runnable_isas() -> tuple[Isa, ...]:
    """The ISAs that this CPU runs, best first, within torch's limit (ATEN_CPU_CAPABILITY)."""
    level = torch.backends.cpu.get_cpu_capability()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    wide = x86 and level == "AVX512"
    runs = {
        "amx_bf16": wide and has_avx512_bf16() and has_matrix_tiles(),
        "avx512_bf16": wide and has_avx512_bf16(),
        "avx512": wide,
        "avx2": x86 and level in ("AVX2", "AVX512"),
        "portable": True,
    }
    return tuple(isa for isa in ISAS if runs[isa.name])


def find_compiler() -> str:
    """The C++ compiler that Inductor would call."""
    if os.name != "posix":
        raise LoweringError("generated CPU kernels need a compiler that takes GCC's flags")
    try:
        from lorafx.torch_internals.cpp import get_cpp_compiler

        return get_cpp_compiler()
    except Exception as error:  # Inductor's own error classes differ between torch versions
        raise LoweringError(
            "no C++ compiler was found; install g++ or clang, or name one in CXX"
        ) from error


def check_compiler() -> None:
    """Raise LoweringError if there is no C++ compiler. Inductor's own search, whose import takes
    0.1 s, is asked only where none of the names that it would try is a program."""
    from lorafx.torch_internals.compat import inductor_config

    names = inductor_config.cpp.cxx
    names = (names,) if isinstance(names, str) else names
    if os.name != "posix" or not any(name and shutil.which(name) for name in names):
        find_compiler()


@functools.cache
def version_of(compiler: str) -> str:
    """The text that a compiler prints for --version."""
    result = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return result.stdout


def cache_folder() -> Path:
    """LORAFX_CACHE_DIR, or a folder of Inductor's cache."""
    folder = os.environ.get("LORAFX_CACHE_DIR")
    if folder is None:
        from lorafx.torch_internals.cpp import cache_dir

        folder = os.path.join(cache_dir(), "lorafx")
    path = Path(folder)
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def compile_library(source: str, flags: tuple[str, ...] = ()) -> Path:
    compiler = find_compiler()
    command = [compiler, *BASE_FLAGS, *flags]
    key = hashlib.sha256("\0".join([source, *command, version_of(compiler)]).encode())
    try:
        library = cache_folder() / f"{key.hexdigest()[:32]}.so"
        if not library.exists():
            _compile(command, source, library)
    except OSError as error:
        raise LoweringError(
            f"generated kernels cannot be written to their cache: {error}; make room there, or set "
            "LORAFX_CACHE_DIR to another folder"
        ) from error
    return library


PROBE = 'extern "C" void lorafx_probe() { %s }\n'


@functools.cache
def best_isa() -> Isa:
    """The best ISA that this CPU runs, and that the compiler and its assembler support."""
    problem = LoweringError("no instruction set")
    for isa in runnable_isas():
        body = '__asm__("vdpbf16ps %zmm0, %zmm0, %zmm0");' if isa.dpbf16 else ""
        body += '__asm__("tdpbf16ps %tmm0, %tmm1, %tmm2");' if isa.matrix_tiles else ""
        try:
            compile_library(PROBE % body, isa.flags)
        except LoweringError as error:
            problem = error
        else:
            return isa
    raise problem


def load_library(path: Path) -> ctypes.CDLL:
    """Map a library into this process for good, since its code is called by address."""
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise LoweringError(
            f"{path} could not be loaded: {error}; delete it, or set LORAFX_CACHE_DIR to another "
            "folder"
        ) from error


def torch_function(name: str) -> int:
    folder = Path(torch.__file__).parent / "lib"
    for candidate in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / candidate).exists():
            function = getattr(ctypes.CDLL(str(folder / candidate)), name, None)
            if function is not None:
                address = ctypes.cast(function, ctypes.c_void_p).value
                assert address is not None
                return address
    raise LoweringError(f"torch {torch.__version__} has no {name}")


def _compile(command: Sequence[str], source: str, library: Path) -> None:
    """Compile `source` to `library`, which is renamed into place when it is complete."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        source_file, unfinished = Path(scratch, "kernel.cpp"), Path(scratch, library.name)
        source_file.write_text(source)
        command = [*command, str(source_file), "-o", str(unfinished)]
        try:
            run = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise LoweringError(f"{command[0]} could not be started: {error}") from error
        if run.returncode:
            raise LoweringError(f"{command[0]} refused a generated kernel:\n{run.stderr[-2000:]}")
        unfinished.replace(library)
