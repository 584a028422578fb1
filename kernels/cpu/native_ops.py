"""CPU kernels of ops in C++: libraries that register them through torch's stable C interface.

    register(op, files) = handles.h + files, compiled and loaded, given torch's functions

The functions are handed over as pointers, so no torch header is read and nothing is linked: a
library takes 0.1 s to compile instead of tens of seconds. A call of its ops costs 2 µs from Python,
where one through a Python kernel costs 20 µs and more.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch

from lorafx.errors import LoweringError
from lorafx.kernels.cpu.compiler import compile_library, load_library, torch_function
from lorafx.kernels.cpu.cpu_source import templates

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
)
_DTYPES = {
    torch.float32: "aoti_torch_dtype_float32",
    torch.bfloat16: "aoti_torch_dtype_bfloat16",
    torch.float16: "aoti_torch_dtype_float16",
    torch.int32: "aoti_torch_dtype_int32",
    torch.int64: "aoti_torch_dtype_int64",
}


@functools.cache
def dtype_code(dtype: torch.dtype) -> int:
    """The number that torch's C interface has for `dtype`."""
    return int(ctypes.CFUNCTYPE(ctypes.c_int32)(torch_function(_DTYPES[dtype]))())


def op_source(files: Sequence[str]) -> str:
    """The text of the library of these files of this folder, which is compiled without flags."""
    return "\n".join(templates("handles.h", *files))


def register(op: str, files: Sequence[str], more_shims: Sequence[str] = ()) -> ctypes.CDLL:
    """The library of these files of this folder, whose CPU kernels torch knows from now on.

    Args:
        op: one of its ops, for messages.
        files: C++ text that stands behind handles.h, and ends in `lorafx_install`.
        more_shims: functions of torch that `lorafx_install` takes behind those of handles.h.

    Raises:
        LoweringError: no compiler, or a torch without the C interface.
    """
    library = load_library(compile_library(op_source(files)))
    names = (*_SHIMS, *more_shims)
    shims = (ctypes.c_void_p * len(names))(*(torch_function(name) for name in names))
    if library.lorafx_install(shims):
        raise LoweringError(f"torch refused the CPU kernels of {op}")
    return library
