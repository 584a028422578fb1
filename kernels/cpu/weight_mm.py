"""Products of any number of rows with a weight, alone and with a LoRA delta.

    weight_mm          y = x Wᵀ + b          x (M, K), W (N, K), y (M, N), b (N,) or none
    weight_mm_delta    y = x Wᵀ + b + Δ(x)   Δ is what `run_delta_` adds by the same kernel
    weight_mms_delta   weight_mm_delta of siblings with one x and one bank

`weight` is W in the dtype of x; or q, int8 (N, K), with scale and maybe zero (N, G) for G groups,

    W[n, k] = (q[n, k] − zero[n, g]) · scale[n, g],    g = k // (K / G)

or q of four bits, uint8 (N, K / 2), in the layout of aten::_weight_int4pack_mm_for_cpu, with a
scale (G, N, 2) that has the zero in it,

    W[n, k] = (q[n, k] − 8) · scale[g, n, 0] + scale[g, n, 1]

On a CPU few rows are multiplied by generated code that reads the weight once (dense.cpp), and
widens integers in registers. More are multiplied by aten.mm and addmm, or by oneDNN if that is
faster, and in float32 where aten has no instructions for the dtype; of integers W is then made in
the dtype of x. The choice is made at each call in C++
(weight_op.cpp), so no graph depends on M; `fixed` products are always generated. Without a compiler
and on other devices aten computes all. A row that generated code computes is bit-equal in all such
batches, but one row alone of integers, which is multiplied by its digits (digits.h), only if
`fixed`. For few rows a product and its delta are one parallel region (delta_beside.cpp), with the
same bits. No gradient is registered.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorafx.errors import LoweringError
from lorafx.kernels.cpu.compiler import Isa, best_isa, torch_function
from lorafx.kernels.cpu.cpu_source import (
    ELEMENTS,
    add_kernel,
    address,
    dtype_code,
    loader,
    register,
)
from lorafx.kernels.cpu.delta_kernels import dispatcher
from lorafx.kernels.cpu.kernels import WIDE, Kernels
from lorafx.kernels.cpu.weight_source import LONGEST_STEP, PACKED, WeightSpec, source
from lorafx.kernels.ops.linear_ops import KERNELS
from lorafx.kernels.ops.op_library import BANK, BankArgs, check_bank, check_rows, define, require
from lorafx.kernels.ops.own_rows import PRODUCTS
from lorafx.torch_internals.cpu import has_matrix_tiles

aten = torch.ops.aten

#: Weights that weight_mms_delta takes.
MOST_WEIGHTS = 8
#: Rows up to which the generated kernel is used. It takes 0.35 to 0.6 of aten.mm's time for up to
#: 16 rows, 0.7 for 32 and 0.85 for 64 in float32 and bfloat16, and about as long for 128 (Zen 4,
#: one thread, cold weights of 1024 × 1024 and 1024 × 2816).
MAX_ROWS = 64
#: The same for bfloat16 where aten.mm alone uses matrix tiles: 0.8 of its time for eight rows, 1.46
#: for 16. By tiles of its own it takes 0.55 for eight, 0.68 for 64 (Sapphire Rapids, two threads).
MAX_ROWS_BESIDE_TILES = 8
#: The same for integers by tiles, which take 0.6 (8 bits) and 0.4 to 0.5 (4 bits) of the time of
#: making W in bfloat16 and of aten.mm for 256 rows, 0.3 and 0.2 for 65.
MAX_ROWS_OF_INTEGERS_BY_TILES = 256


def beats_aten(dtype: torch.dtype) -> bool:
    """Whether something else than aten multiplies more rows, if `ready`."""
    return bool(op_library().lorafx_has_many(dtype_code(dtype)))


def max_rows(spec: WeightSpec | None) -> int:
    """The number of rows up to which the generated kernel is used; 0 if there is none."""
    if spec is None or spec.dtype not in ELEMENTS:
        return 0
    if spec.dtype != torch.bfloat16 or not has_matrix_tiles():
        return MAX_ROWS
    if not _generates_tiles():
        return MAX_ROWS_BESIDE_TILES
    return MAX_ROWS if spec.scale is None else MAX_ROWS_OF_INTEGERS_BY_TILES


def _generates_tiles() -> bool:
    """Whether the compiler knows matrix tiles, if there is one."""
    try:
        return best_isa().matrix_tiles
    except LoweringError:
        return False


WEIGHT_OPS = ("epilogue.h", "dense_args.h", "weight_op.cpp")


@functools.cache
def op_library() -> ctypes.CDLL:
    shims = (  # in the order of `struct WeightShims`
        "aoti_torch__reinterpret_tensor",
        "aoti_torch_cpu_mm_out",
        "aoti_torch_cpu_addmm_out",
        "torch_new_list_reserve_size",
        "torch_list_push_back",
        "aoti_torch_copy_",
    )
    functions = [dispatcher().lorafx_run_delta]
    library = register("lorafx::weight_mm", WEIGHT_OPS, shims, functions, _LOAD)
    library.lorafx_add_many.argtypes = (ctypes.c_int32, ctypes.c_void_p)
    many_by_onednn(library)
    for dtype in _INSTRUCTIONS:
        many_in_float32(library, dtype)
    return library


def many_by_onednn(library: ctypes.CDLL, enabled: bool | None = None) -> None:
    """Multiply many float32 rows by oneDNN, or by MKL; None chooses the faster one. If MKL has only
    general code, oneDNN takes 0.65 to 0.8 of its time for 96 to 200 rows (Zen 4, cold weights), and
    0.43 to 1.09 for 72 to 2,048 with AVX2 alone (Zen 3, least where the weight is widest)."""
    if enabled is None:
        enabled = torch.backends.mkldnn.is_available() and bool(library.lorafx_mm_is_slow())
    linear = torch_function("aoti_torch_cpu__linear_pointwise") if enabled else None
    library.lorafx_add_many(dtype_code(torch.float32), linear)


#: Whether oneDNN has instructions for a dtype; aten.mm converts each number by itself otherwise.
_INSTRUCTIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def many_in_float32(library: ctypes.CDLL, dtype: torch.dtype, enabled: bool | None = None) -> None:
    """Multiply many rows of a dtype in float32; None does so where aten has no instructions for it.
    Converting takes 0.14 to 0.25 of aten.mm's time for 65 to 1,024 rows, and as long as generated
    code for 64 to 128 (Zen 3, AVX2, one thread, W of 1024 × 1024 to 2816 × 1024)."""
    if enabled is None:
        supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{_INSTRUCTIONS[dtype]}_supported", None)
        enabled = supported is not None and not supported()
    library.lorafx_widen_many(dtype_code(dtype), dtype_code(torch.float32) if enabled else 0)


def _enter(spec: WeightSpec, isa: Isa, library: ctypes.CDLL) -> bool:
    functions = library.lorafx_kernel, getattr(library, "lorafx_widen", None)
    add_kernel(op_library(), spec.key, *map(address, functions), max_rows(spec))
    if spec == WeightSpec(spec.dtype, spec.dtype):
        PRODUCTS[spec.dtype] = WEIGHT_MM
    return True


GENERATED = Kernels("products of few rows stay with aten", source, _enter, lanes=WIDE)


def ready(spec: WeightSpec | None) -> bool:
    """Whether there is a kernel of `spec`, and one of its dtype, which multiplies many rows; both
    are compiled and loaded."""
    if spec is None:
        return False
    return bool(GENERATED.ready(WeightSpec(spec.dtype, spec.dtype)) and GENERATED.ready(spec))


_LOAD = loader(op_library, WeightSpec.of_key, ready)


def widened(
    dtype: torch.dtype, weight: Tensor, scale: Tensor, zero: Tensor | None = None
) -> Tensor:
    """W (N, K) in `dtype`."""
    groups = weight.unflatten(1, (scale.shape[1], -1)).float()
    if zero is not None:
        groups = groups - zero.float()[:, :, None]
    return (groups * scale.float()[:, :, None]).flatten(1).to(dtype)


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    sizes: Sequence[int] | None = None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    fixed: bool = False,
) -> Tensor:
    """y. `sizes` are parts of N that are multiplied one by one if rows are many (`split_is_faster`
    of the cost model). Raises LoweringError if no generated kernel computes a `fixed` product."""
    operands = x, weight, bias, sizes, scale, zero, fixed
    # A graph from a cache may be the first to need the kernel, which then replaces this function.
    if x.device.type == "cpu" and ready(WeightSpec.of(x, weight, scale, zero)):
        y: Tensor = WEIGHT_MM(*operands)
        return y
    product_fake(*operands)
    require("weight_mm", not fixed, "there is no generated kernel for a fixed product")
    if scale is not None and weight.dtype == PACKED:
        group = x.shape[1] // scale.shape[0]
        y = aten._weight_int4pack_mm_for_cpu(x, weight, group, scale.to(x.dtype))
        return y if bias is None else y + bias
    right = (weight if scale is None else widened(x.dtype, weight, scale, zero)).T
    return torch.mm(x, right) if bias is None else torch.addmm(bias, x, right)


def product_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    sizes: Sequence[int] | None = None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    fixed: bool = False,
) -> Tensor:
    op = "weight_mm"
    require(op, x.dim() == 2 and weight.dim() == 2, "x is (M, K), weight (N, K)")
    N, K = weight.shape
    if scale is None:
        require(op, zero is None, "a zero without a scale")
        require(
            op, x.dtype == weight.dtype, f"x and weight differ in dtype: {x.dtype}, {weight.dtype}"
        )
    else:
        K *= 2 if weight.dtype == PACKED else 1
        _check_tables(op, weight, K, scale, zero)
    require(op, x.shape[1] == K, f"x has {x.shape[1]} columns, weight has {K}")
    require(op, not sizes or sum(sizes) == N, f"sizes {sizes} do not add up to {N}")
    fits = bias is None or (bias.shape == (N,) and bias.dtype == x.dtype)
    require(op, fits, f"bias is ({N},) of {x.dtype}, as x")
    return x.new_empty(x.shape[0], N)


def _check_tables(op: str, q: Tensor, K: int, scale: Tensor, zero: Tensor | None) -> None:
    """Check the scale and zero of integers (N, K), or packed ones."""
    N, shape = q.shape[0], tuple(scale.shape)
    if q.dtype == PACKED:
        fits = zero is None and shape[1:] == (N, 2) and N % 16 == 0
        fits = fits and shape[0] > 0 and K % (shape[0] * LONGEST_STEP) == 0
        require(op, fits, f"scale and zero are (groups, N, 2) of {LONGEST_STEP}s, not {shape}")
    else:
        fits = len(shape) == 2 and shape[0] == N and shape[1] > 0 and K % shape[1] == 0
        require(op, fits, f"scale is (N, groups), not {shape}")
    require(op, zero is None or tuple(zero.shape) == shape, f"zero is {shape}")


def product_and_delta(
    x: Tensor, weight: Tensor, bank: BankArgs, rows: int, kernel: int, *others: Any
) -> Tensor:
    """`product` plus its delta; `others` are those of `product`."""
    spec = WeightSpec.of(x, weight, *others[2:4])
    if x.device.type == "cpu" and kernel in KERNELS and ready(spec):
        joined: Tensor = WEIGHT_MM_DELTA(x, weight, *bank, rows, kernel, *others)
        return joined
    y: Tensor = WEIGHT_MM(x, weight, *others)
    torch.ops.lorafx.run_delta_(y, x, *bank, rows, kernel)
    return y


def product_and_delta_fake(
    x: Tensor, weight: Tensor, bank: BankArgs, rows: int, kernel: int, *others: Any
) -> Tensor:
    y = product_fake(x, weight, *others)
    check_bank("weight_mm_delta", bank)
    check_rows("weight_mm_delta", y.shape[:-1], y.shape[:-1], rows)
    return y


def products_and_deltas(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bank: BankArgs,
    rows: int,
    kernels: Sequence[int],
    fixed: bool = False,
) -> list[Tensor]:
    """`product_and_delta` of each weight, its scale and zero behind it; one call takes less time
    than several."""
    parts, tables = len(kernels), len(weights) // max(len(kernels), 1)
    fits = parts > 0 and tables * parts == len(weights) and len(biases) in (0, parts)
    require("weight_mms_delta", fits, "weights, biases and kernels differ in number")
    results = []
    for i, kernel in enumerate(kernels):
        weight, *scales = weights[i * tables : (i + 1) * tables]
        scale, zero = (*scales, None, None)[:2]
        others = biases[i] if biases else None, None, scale, zero, fixed
        results.append(WEIGHT_MM_DELTA(x, weight, *bank, rows, kernel, *others))
    return results


_OTHERS = (
    "Tensor? bias=None, int[]? sizes=None, Tensor? scale=None, Tensor? zero=None, bool fixed=False"
)
define(
    f"weight_mm(Tensor x, Tensor weight, {_OTHERS}) -> Tensor",
    *(product, product_fake),
    lowered=True,
)
define(
    f"weight_mm_delta(Tensor x, Tensor weight, {BANK}, SymInt rows, int kernel, {_OTHERS})"
    " -> Tensor",
    *(product_and_delta, product_and_delta_fake),
    lowered=True,
)
define(
    f"weight_mms_delta(Tensor x, Tensor[] weights, Tensor[] biases, {BANK}, SymInt rows, "
    "int[] kernels, bool fixed=False) -> Tensor[]",
    *(products_and_deltas, products_and_deltas),
    lowered=True,
)
WEIGHT_MM = torch.ops.lorafx.weight_mm.default
WEIGHT_MM_DELTA = torch.ops.lorafx.weight_mm_delta.default
WEIGHT_MMS_DELTA = torch.ops.lorafx.weight_mms_delta.default
