"""Products of any number of rows with a dense weight, alone and with a LoRA delta.

    dense_mm            y = x Wᵀ              x (M, K), W (N, K), y (M, N)
    dense_addmm         y = x Wᵀ + b          b (N,)
    dense_mm_delta      y = x Wᵀ + Δ(x)       Δ is what `run_delta_` adds by the same kernel
    dense_addmm_delta   y = x Wᵀ + b + Δ(x)

On a CPU few rows are multiplied by generated code that reads W once (dense.cpp), more by aten.mm
and addmm, or by oneDNN if that is faster. The choice is made at each call in C++ (dense_op.cpp), so
no graph depends on M. Without a compiler and on other devices aten computes all. A row that
generated code computes is bit-equal in all such batches. For few rows a product and its delta are
one parallel region (delta_beside.cpp), with the same bits. No gradient is registered.

    source(dtype, isa) = #defines and constants of (dtype, tiles)
                         + vectors.h + epilogue.h + dense_args.h + dense.cpp
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorafx.errors import LoweringError
from lorafx.kernels.cpu.compiler import Isa, has_matrix_tiles, torch_function
from lorafx.kernels.cpu.cpu_source import (
    ELEMENTS,
    SERIAL_WORK,
    dtype_code,
    kernel_source,
    register,
)
from lorafx.kernels.cpu.delta_kernels import dispatcher
from lorafx.kernels.cpu.kernels import WIDE, Kernels
from lorafx.kernels.ops.linear_ops import KERNELS
from lorafx.kernels.ops.op_library import BANK, BankArgs, check_bank, check_rows, define, require

#: Bytes of W in a unit of work, which stay in a cache of the core for later tiles of rows.
UNIT_BYTES = 1 << 18
#: Columns of y per step of an epilogue; 64 to 1024 are as good (Zen 4, 16 rows, float32).
EPILOGUE_COLUMNS = 256
#: How often a thread checks whether the others are done before it yields.
SPINS = 1 << 10


def source(dtype: torch.dtype, isa: Isa) -> str:
    # Converting x once takes less time than converting it for each column.
    step = "F32" if dtype == torch.float16 else ELEMENTS[dtype]
    return source_with(dtype, dtype, isa, step, {"STORED": 0, "GROUPED": 0, "PACKED": 0})


def source_with(
    spec: object,
    dtype: torch.dtype,
    isa: Isa,
    step: str,
    defines: Mapping[str, object],
    tiles: Sequence[str] = (),
) -> str:
    """The text of a kernel for x and y of `dtype`, multiplied as the element type `step`, in tiles
    of the files `tiles` if there are any, else in those of dense.cpp."""
    # Of eight rows, tiles of eight take 0.8 to 0.93 (float32), 0.9 (bfloat16) and 0.76 (int8) of
    # the time of six and two, but 1.07 where integers become float32 (Zen 4, cold weights).
    full = 8 if (isa.dpbf16 if step == "BF16" else not defines["STORED"]) else 6
    sizes = {
        "TILE": full if isa.lanes == 16 else 4,
        "ACCUMULATORS": 24 if isa.lanes == 16 else 12,
        "UNIT_BYTES": UNIT_BYTES,
        "SERIAL_WORK": SERIAL_WORK,
        "EPILOGUE_COLUMNS": EPILOGUE_COLUMNS,
        "SPINS": SPINS,
    }
    defines = {"E": step, "WIDENED": int(step != ELEMENTS[dtype]), **defines}
    files = ("vectors.h", "epilogue.h", "dense_args.h", *tiles, "dense.cpp")
    return kernel_source(spec, isa, (dtype,) * 3, sizes, files, defines)


DENSE_OPS = ("epilogue.h", "dense_args.h", "dense_op.cpp")
#: Functions that dense_op.cpp calls beside those of handles.h, in the order of `struct DenseShims`.
_MORE_SHIMS = (
    "aoti_torch__reinterpret_tensor",
    "aoti_torch_cpu_mm_out",
    "aoti_torch_cpu_addmm_out",
    "torch_new_list_reserve_size",
    "torch_list_push_back",
)

#: Rows up to which the generated kernel is used. It takes 0.35 to 0.6 of aten.mm's time for up to
#: 16 rows, 0.7 for 32 and 0.85 for 64 in float32 and bfloat16, and about as long for 128 (Zen 4,
#: one thread, cold weights of 1024 × 1024 and 1024 × 2816).
MAX_ROWS = 64
#: The same for float16 if aten.mm has no instructions for it: the generated kernel is 3 to 5 times
#: as fast for 4 to 512 rows; more were not measured.
MAX_ROWS_FLOAT16 = 512
#: The same for bfloat16 on a CPU whose matrix tiles aten.mm uses; a guess, not measured.
MAX_ROWS_WITH_TILES = 8


def beats_aten(rows: int, dtype: torch.dtype) -> bool:
    """Whether something else than aten multiplies this many rows, if `ready`."""
    return rows <= max_rows(dtype) or bool(op_library().lorafx_has_many(dtype_code(dtype)))


def max_rows(dtype: torch.dtype) -> int:
    """The number of rows up to which the generated kernel is used; 0 if there is none."""
    if dtype not in ELEMENTS:
        return 0
    if dtype == torch.bfloat16 and has_matrix_tiles():
        return MAX_ROWS_WITH_TILES
    return MAX_ROWS_FLOAT16 if dtype == torch.float16 and _aten_converts_float16() else MAX_ROWS


@functools.cache
def _aten_converts_float16() -> bool:
    """Whether aten.mm converts float16 itself, and does not use oneDNN."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None)
    return supported is not None and not supported()


@functools.cache
def op_library() -> ctypes.CDLL:
    library = register("lorafx::dense_mm", DENSE_OPS, _MORE_SHIMS)
    library.lorafx_add.argtypes = (ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p)
    library.lorafx_add_many.argtypes = (ctypes.c_int32, ctypes.c_void_p)
    library.lorafx_install_deltas.argtypes = (ctypes.c_void_p,) * 2
    functions = dispatcher().lorafx_run_delta, _LOAD
    if library.lorafx_install_deltas(*(ctypes.cast(f, ctypes.c_void_p) for f in functions)):
        raise LoweringError("torch refused the CPU kernels of lorafx::dense_mm_delta")
    many_by_onednn(library)
    return library


@ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int64)
def _LOAD(dtype: int) -> int:
    """Called where a graph from a cache is the first to multiply this dtype."""
    return int(not any(ready(known) for known in ELEMENTS if dtype_code(known) == dtype))


def many_by_onednn(library: ctypes.CDLL, enabled: bool | None = None) -> None:
    """Multiply many float32 rows by oneDNN, or by MKL; None chooses the faster one. If MKL has only
    general code, oneDNN takes 0.65 to 0.8 of its time for 96 to 200 rows (Zen 4, cold weights)."""
    if enabled is None:
        enabled = torch.backends.mkldnn.is_available() and bool(library.lorafx_mm_is_slow())
    linear = torch_function("aoti_torch_cpu__linear_pointwise") if enabled else None
    library.lorafx_add_many(dtype_code(torch.float32), linear)


def _enter(dtype: torch.dtype, isa: Isa, library: ctypes.CDLL) -> bool:
    kernel = ctypes.cast(library.lorafx_kernel, ctypes.c_void_p)
    op_library().lorafx_add(dtype_code(dtype), max_rows(dtype), kernel)
    return True


GENERATED = Kernels("products of few rows stay with aten", source, _enter, lanes=WIDE)


def ready(dtype: torch.dtype) -> bool:
    """Whether there is a kernel for `dtype`, which is compiled and loaded."""
    return dtype in ELEMENTS and bool(GENERATED.ready(dtype))


def product(*operands: Any) -> Tensor:
    """y for the operands (bias (N,),) x (M, K), weight (N, K), contiguous, and `sizes`: parts of N
    that are multiplied one by one if rows are many (`split_is_faster` of the cost model)."""
    *bias, x, weight, _ = operands
    # A graph from a cache may be the first to need the kernel, which then replaces this function.
    if x.device.type == "cpu" and ready(x.dtype):
        y: Tensor = (DENSE_ADDMM if bias else DENSE_MM)(*operands)
        return y
    product_fake(*operands)
    return torch.addmm(bias[0], x, weight.T) if bias else torch.mm(x, weight.T)


def product_fake(*operands: Any) -> Tensor:
    *bias, x, weight, sizes = operands
    op = "dense_addmm" if bias else "dense_mm"
    require(op, x.dim() == 2 and weight.dim() == 2, "x is (M, K), weight (N, K)")
    N, K = weight.shape
    require(op, x.shape[1] == K, f"x has {x.shape[1]} columns, weight has {K}")
    require(op, not sizes or sum(sizes) == N, f"sizes {sizes} do not add up to {N}")
    require(op, all(vector.shape == (N,) for vector in bias), f"bias is ({N},)")
    y: Tensor = x.new_empty(x.shape[0], N)
    return y


def split_arguments(arguments: Sequence[Any]) -> tuple[Sequence[Any], BankArgs, int, int]:
    """The operands of `product`, and the bank, rows and kernel of `run_delta_`."""
    *first, rows, kernel = arguments
    count = len(first) - len(BankArgs._fields)
    return first[:count], BankArgs(*first[count:]), rows, kernel


def product_and_delta(*arguments: Any) -> Tensor:
    """`product` plus its delta."""
    operands, bank, rows, kernel = split_arguments(arguments)
    *bias, x, _, _ = operands
    if x.device.type == "cpu" and kernel in KERNELS and ready(x.dtype):
        joined: Tensor = (DENSE_ADDMM_DELTA if bias else DENSE_MM_DELTA)(*arguments)
        return joined
    y: Tensor = (DENSE_ADDMM if bias else DENSE_MM)(*operands)
    torch.ops.lorafx.run_delta_(y, x, *bank, rows, kernel)
    return y


def product_and_delta_fake(*arguments: Any) -> Tensor:
    (*bias, x, weight, sizes), bank, rows, _ = split_arguments(arguments)
    y = product_fake(*bias, x, weight, sizes)
    op = "dense_addmm_delta" if bias else "dense_mm_delta"
    check_bank(op, bank)
    check_rows(op, y.shape[:-1], y.shape[:-1], rows)
    return y


for _name, _first in (("mm", ""), ("addmm", "Tensor bias, ")):
    _operands = f"{_first}Tensor x, Tensor weight, int[] sizes"
    define(f"dense_{_name}({_operands}) -> Tensor", product, product_fake, lowered=True)
    define(
        f"dense_{_name}_delta({_operands}, {BANK}, SymInt rows, int kernel) -> Tensor",
        *(product_and_delta, product_and_delta_fake),
        lowered=True,
    )
DENSE_MM = torch.ops.lorafx.dense_mm.default
DENSE_ADDMM = torch.ops.lorafx.dense_addmm.default
DENSE_MM_DELTA = torch.ops.lorafx.dense_mm_delta.default
DENSE_ADDMM_DELTA = torch.ops.lorafx.dense_addmm_delta.default
