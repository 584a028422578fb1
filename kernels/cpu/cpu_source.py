"""C++ source that CPU kernels share, and the registration of ops in C++.

    register(op, files) compiles and loads handles.h + kernel_table.h + files, and passes them
                        torch's functions

The functions are pointers of torch's stable C interface. No torch header is read and nothing is
linked, so a library compiles in 0.1 s instead of tens of seconds. A call from Python takes 2 µs,
against 20 µs and more for a kernel in Python.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any, TypeVar

import torch

from lorafx.errors import LoweringError
from lorafx.kernels.cpu.compiler import Isa, compile_library, load_library, torch_function

S = TypeVar("S")

ELEMENTS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
#: Integers, which become floats in registers.
INTEGERS = {torch.int8: "I8"}

# The number of multiply-adds below which one thread is faster: waking others takes about 3 µs.
SERIAL_WORK = 1 << 15
# The distance in bytes at which B is prefetched; 512 was the best of 0, 128 ... 1024 for decode in
# float32 and bfloat16 (Zen 4, 8 adapters of rank 16, N = 1024 ... 5632).
AHEAD = 512


def templates(*names: str) -> list[str]:
    return [_template(name) for name in names]


@functools.cache
def _template(name: str) -> str:
    return resources.files("lorafx.kernels.cpu").joinpath(name).read_text()


def tile_sizes(isa: Isa) -> dict[str, int]:
    """The constants of tiles.h that depend only on the instruction set."""
    return {
        "TILE": isa.tile,
        "PLANES": isa.planes,
        "PAIRS": isa.pairs,
        "AHEAD": AHEAD,
        "STREAMS": 0,  # planes side by side, as many as registers hold
        "CHAINED": 0,
        "SERIAL_WORK": SERIAL_WORK,
    }


def kernel_source(
    spec: object,
    isa: Isa,
    elements: tuple[torch.dtype, torch.dtype, torch.dtype],
    sizes: Mapping[str, int],
    files: Sequence[str],
    defines: Mapping[str, object] | None = None,
) -> str:
    """The text of a kernel: a heading; the defines for vectors.h, with `elements`, the dtypes of x,
    factors and y; the constants `sizes`; and files of this folder."""
    x, factors, y = (ELEMENTS[dtype] for dtype in elements)
    macros: dict[str, object] = {
        **{"LANES": isa.lanes, "HAS_F16C": int(isa.f16c), "HAS_DPBF16": int(isa.dpbf16)},
        **{"X": x, "W": factors, "Y": y},
        **(defines or {}),
    }
    lines = [f"// {isa.name}: {spec}"]
    lines += [f"#define {name} {value}" for name, value in macros.items()]
    lines += [f"static const long {name} = {value};" for name, value in sizes.items()]
    return "\n".join([*lines, *templates(*files)])


# --- ops in C++ ---

#: In the order of `struct Shims` of handles.h.
_SHIMS = (
    "aoti_torch_library_init_impl",
    "torch_library_impl",
    "aoti_torch_abi_version",
    "aoti_torch_get_data_ptr",
    "aoti_torch_get_dim",
    "aoti_torch_get_sizes",
    "aoti_torch_get_strides",
    "aoti_torch_get_dtype",
    "aoti_torch_delete_tensor_object",
    "torch_get_num_threads",
    "torch_parallel_for",
    "aoti_torch_empty_strided",
    "torch_list_size",
    "torch_list_get_item",
    "torch_delete_list",
)
_DTYPES = {
    torch.float32: "aoti_torch_dtype_float32",
    torch.bfloat16: "aoti_torch_dtype_bfloat16",
    torch.float16: "aoti_torch_dtype_float16",
    torch.int8: "aoti_torch_dtype_int8",
    torch.uint8: "aoti_torch_dtype_uint8",
    torch.int32: "aoti_torch_dtype_int32",
    torch.int64: "aoti_torch_dtype_int64",
}


@functools.cache
def dtype_code(dtype: torch.dtype) -> int:
    return int(ctypes.CFUNCTYPE(ctypes.c_int32)(torch_function(_DTYPES[dtype]))())


def dtype_of(code: int) -> torch.dtype | None:
    return next((dtype for dtype in _DTYPES if dtype_code(dtype) == code), None)


def op_source(files: Sequence[str]) -> str:
    """The text of a library of ops, which is compiled without flags for instructions."""
    return "\n".join(templates("handles.h", "kernel_table.h", *files))


def address(function: Any) -> int:
    """Of a C function; 0 for None."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def register(
    op: str,
    files: Sequence[str],
    more_shims: Sequence[str] = (),
    functions: Sequence[Any] = (),
    load: Any = None,
) -> ctypes.CDLL:
    """Load the library of these files. Its `lorafx_install` receives torch's functions for
    handles.h, `more_shims`, and `functions`, and registers the CPU kernels of `op`. `load` is of
    `loader`."""
    library = load_library(compile_library(op_source(files)))
    addresses = *map(torch_function, (*_SHIMS, *more_shims)), *map(address, functions)
    if load is not None:
        library.lorafx_load_by(load)
    if library.lorafx_install((ctypes.c_void_p * len(addresses))(*addresses)):
        raise LoweringError(f"torch refused the CPU kernels of {op}")
    return library


Key = tuple[int, ...]
_KEY_PARTS, _MOST_WORDS = 6, 24


def add_kernel(library: ctypes.CDLL, key: Key, *words: int) -> None:
    """Add a kernel to the table of a library of ops, or replace that of its key. `words` are
    addresses and numbers as its `struct Kernel` has them behind the key; without any there is no
    kernel. Raises LoweringError if the table is full."""
    padded = (*key, *[0] * (_KEY_PARTS - len(key)), *words)
    if library.lorafx_add((ctypes.c_int64 * _MOST_WORDS)(*padded)):
        raise LoweringError("the table of generated CPU kernels is full; restart the process")


def loader(
    library: Callable[[], ctypes.CDLL],
    spec_of: Callable[[Key], S | None],
    ready: Callable[[S], object],
) -> Any:
    """The C function that asks `ready` for the kernel of a call, where a graph from a cache is the
    first to need it. If there is none, the table says so from then on."""

    @ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_int64 * _KEY_PARTS))
    def wanted(parts: Any) -> None:
        key = tuple(parts.contents)
        spec = spec_of(key)
        if spec is None or not ready(spec):
            add_kernel(library(), key)

    return wanted
