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
(weight_op.cpp); `fixed` products are always generated. Without a compiler and on other devices aten
computes all. A row is bit-equal in all batches of generated code, alone only if `fixed`. A product
of few rows and its delta are one parallel region (delta_beside.cpp). No gradient is registered.

    source(spec, isa) = #defines and constants of spec
                        + vectors.h + epilogue.h + dense_args.h + dense_call.h
                        + planes.h, packed.h or matrix_tiles.h + dense.cpp
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafx.kernels.cpu.compiler import Isa, runnable_isas, torch_function
from lorafx.kernels.cpu.cpu_source import (
    ELEMENTS,
    INTEGERS,
    SERIAL_WORK,
    Key,
    add_kernel,
    address,
    dtype_code,
    dtype_of,
    kernel_source,
    loader,
    register,
)
from lorafx.kernels.cpu.delta_kernels import dispatcher
from lorafx.kernels.cpu.kernels import WIDE, Kernels
from lorafx.kernels.ops.linear_ops import KERNELS
from lorafx.kernels.ops.op_library import BANK, BankArgs, check_bank, check_rows, define, require
from lorafx.kernels.ops.own_rows import PRODUCTS
from lorafx.torch_internals.cpu import has_matrix_tiles
from lorafx.torch_internals.graph_parts import unset_fake_temporarily

aten = torch.ops.aten

#: Bytes of W in a unit of work, which stay in a cache of the core for later tiles of rows.
UNIT_BYTES = 1 << 18
#: Columns of y per step of an epilogue; 64 to 1024 are as good (Zen 4, 16 rows, float32).
EPILOGUE_COLUMNS = 256
#: How often a thread checks whether the others are done before it yields.
SPINS = 1 << 10
#: Elements of the longest step of a kernel, which no group may cut.
LONGEST_STEP = 32
#: The dtype of bytes that hold two integers each.
PACKED = torch.uint8
#: Weights that weight_mms_delta takes.
MOST_WEIGHTS = 8


@dataclass(frozen=True)
class WeightSpec:
    """Dtypes of x, of W or its integers, of scale and zero, and whether those two are applied to
    each number, not to y."""

    dtype: torch.dtype
    weight: torch.dtype
    scale: torch.dtype | None = None
    zero: torch.dtype | None = None
    grouped: bool = False

    @classmethod
    def of(
        cls, x: Tensor, weight: Tensor, scale: Tensor | None = None, zero: Tensor | None = None
    ) -> WeightSpec | None:
        """None if no kernel is generated; the tensors may be fake."""
        if scale is None:
            return cls(x.dtype, weight.dtype)._if_generated()
        grouped = zero is not None or scale.dim() == 3 or scale.shape[1] > 1
        dtypes = x.dtype, weight.dtype, scale.dtype, None if zero is None else zero.dtype
        return cls(*dtypes, grouped)._if_generated()

    def _if_generated(self) -> WeightSpec | None:
        integers = self.weight in INTEGERS or (self.weight == PACKED and packed_block() > 0)
        known = integers if self.scale else self.weight == self.dtype
        zeros = {None, *ELEMENTS, *INTEGERS}
        floats = {self.dtype, self.scale or self.dtype} <= ELEMENTS.keys()
        return self if known and floats and self.zero in zeros else None

    @property
    def key(self) -> Key:
        """The key by which weight_op.cpp finds the kernel."""
        tables = (
            0 if dtype is None else dtype_code(dtype) + 1 for dtype in (self.scale, self.zero)
        )
        return dtype_code(self.dtype), dtype_code(self.weight), *tables, int(self.grouped)

    @classmethod
    def of_key(cls, key: Key) -> WeightSpec | None:
        dtype, weight, scale, zero = map(dtype_of, (*key[:2], key[2] - 1, key[3] - 1))
        if dtype and weight:
            return cls(dtype, weight, scale, zero, bool(key[4]))._if_generated()
        return None


@functools.cache
def packed_block() -> int:
    """The rows of a block as torch packs integers of four bits in this process; 0 if packed.h does
    not read it."""
    with unset_fake_temporarily():
        for block in (64, 32):
            q = torch.arange(2 * block, dtype=torch.int32).pow(2).remainder(13).view(block, 2)
            lines = (q[: block // 2] | q[block // 2 :] << 4).T
            packed = aten._convert_weight_to_int4pack_for_cpu(q, 1)
            if torch.equal(packed.view(lines.shape), lines.to(PACKED)):
                return block
    return 0


def source(spec: WeightSpec, isa: Isa) -> str:
    is_packed, is_stored = spec.weight == PACKED, spec.scale is not None and spec.weight != PACKED
    elements: dict[Any, str] = {**ELEMENTS, **INTEGERS}
    defines: dict[str, object] = {"PACKED": int(is_packed), "STORED": int(is_stored)}
    # Converting x once takes less time than converting it for each column.
    step = ELEMENTS[spec.dtype] if isa.dpbf16 and spec.dtype != torch.float16 else "F32"
    matrix = isa.matrix_tiles and step == "BF16" and (not is_packed or packed_block() == 64)
    if is_packed:
        defines |= {"BLOCK": packed_block(), "S": elements[spec.scale]}
    else:
        defines |= {"GROUPED": int(spec.grouped)}
    if is_stored:
        defines |= {"HAS_ZERO": int(spec.zero is not None), "W": elements[spec.weight]}
        defines |= {"S": elements[spec.scale], "Z": elements[spec.zero or spec.weight]}
    # Eight rows: tiles of eight take 0.76 (int8) to 0.9 of six and two, but 1.07 where integers
    # become float32 (Zen 4). With 16 registers two of four in turn take 0.75 to 0.8 (Zen 3).
    tile = 4 if isa.lanes < 16 else 6 if is_stored and step == "F32" else 16 if matrix else 8
    sizes = {
        "TILE": tile,
        "BLOCK_ROWS": 4 * tile if isa.lanes == 8 and not is_packed else tile,
        "ACCUMULATORS": 24 if isa.lanes == 16 else 12,
        "STREAMS": isa.streams,
        "LOCALITY": isa.locality,
        "UNIT_BYTES": UNIT_BYTES,
        "SERIAL_WORK": SERIAL_WORK,
        "EPILOGUE_COLUMNS": EPILOGUE_COLUMNS,
        "SPINS": SPINS,
    }
    defines |= {"E": step, "WIDENED": int(step != ELEMENTS[spec.dtype]), "MATRIX": int(matrix)}
    defines |= {"SPLIT": int(spec.weight == torch.bfloat16 and step == "F32")}
    tiles = "packed.h" if is_packed else "matrix_tiles.h" if matrix else "planes.h"
    heads = ["vectors.h", "epilogue.h", "dense_args.h", "dense_call.h", *["amx.h"] * matrix]
    return kernel_source(spec, isa, (spec.dtype,) * 3, sizes, [*heads, tiles, "dense.cpp"], defines)


#: Rows up to which the generated kernel is used. It takes 0.35 to 0.6 of aten.mm's time for up to
#: 16 rows, 0.85 for 64, and about as long for 128 (Zen 4, one thread, cold weights).
MAX_ROWS = 64
#: The same for bfloat16 where aten.mm alone uses matrix tiles: 0.8 of its time for eight rows, 1.46
#: for 16. By tiles of its own it takes 0.55 for eight, 0.68 for 64 (Sapphire Rapids, two threads).
MAX_ROWS_WITHOUT_TILES = 8


def beats_aten(rows: int, dtype: torch.dtype) -> bool:
    """Whether something else than aten multiplies this many rows, if `ready`."""
    return rows <= max_rows(dtype) or bool(op_library().lorafx_has_many(dtype_code(dtype)))


def max_rows(dtype: torch.dtype) -> int:
    """The number of rows up to which the generated kernel is used; 0 if there is none."""
    if dtype not in ELEMENTS:
        return 0
    few = dtype == torch.bfloat16 and has_matrix_tiles() and not runnable_isas()[0].matrix_tiles
    return MAX_ROWS_WITHOUT_TILES if few else MAX_ROWS


WEIGHT_OPS = ("epilogue.h", "dense_args.h", "weight_op.cpp")


@functools.cache
def op_library() -> ctypes.CDLL:
    shims = (  # as in `struct WeightShims`
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
    general code, oneDNN takes 0.65 to 0.8 of its time for 96 to 200 rows (Zen 4)."""
    if enabled is None:
        enabled = torch.backends.mkldnn.is_available() and bool(library.lorafx_mm_is_slow())
    linear = torch_function("aoti_torch_cpu__linear_pointwise") if enabled else None
    library.lorafx_add_many(dtype_code(torch.float32), linear)


#: Whether oneDNN has instructions for a dtype; aten.mm converts each number by itself otherwise.
_INSTRUCTIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def many_in_float32(library: ctypes.CDLL, dtype: torch.dtype, enabled: bool | None = None) -> None:
    """Multiply many rows of a dtype in float32; None does so where aten has no instructions for it.
    Converting takes 0.14 to 0.25 of aten.mm's time for 65 to 1,024 rows (Zen 3, one thread)."""
    if enabled is None:
        supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{_INSTRUCTIONS[dtype]}_supported", None)
        enabled = supported is not None and not supported()
    library.lorafx_widen_many(dtype_code(dtype), dtype_code(torch.float32) if enabled else 0)


def _enter(spec: WeightSpec, isa: Isa, library: ctypes.CDLL) -> bool:
    functions = library.lorafx_kernel, getattr(library, "lorafx_widen", None)
    add_kernel(op_library(), spec.key, *map(address, functions), max_rows(spec.dtype))
    if spec == WeightSpec(spec.dtype, spec.dtype):
        PRODUCTS[spec.dtype] = WEIGHT_MM
    return True


GENERATED = Kernels("products of few rows stay with aten", source, _enter, lanes=WIDE)


def ready(spec: WeightSpec | None) -> bool:
    """Whether there are kernels of `spec` and of its dtype, for many rows; both are compiled."""
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
    """`product_and_delta` of each weight, its scale and zero behind it, in less time."""
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
