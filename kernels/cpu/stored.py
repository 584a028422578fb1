"""Products of any number of rows with a weight of integers, alone and with a LoRA delta.

    stored_mm           y = x Wᵀ              x (M, K), W (N, K), y (M, N)
    stored_addmm        y = x Wᵀ + b          b (N,)
    stored_mm_delta     y = x Wᵀ + Δ(x)       Δ is what `run_delta_` adds by the same kernel
    stored_addmm_delta  y = x Wᵀ + b + Δ(x)
    stored_mms_delta    stored_mm_delta, or addmm, for weights of siblings with one x and one bank

`weight` is [q, scale] or [q, scale, zero]: q (N, K) int8, the others (N, G) for G groups,

    W[n, k] = (q[n, k] − zero[n, g]) · scale[n, g],    g = k // (K / G)

or [packed, scale_and_zero] as aten::_weight_int4pack_mm_for_cpu takes them: q of four bits in
torch's layout, (N, K / 2) uint8, and (G, N, 2),

    W[n, k] = (q[n, k] − 8) · scale_and_zero[g, n, 0] + scale_and_zero[g, n, 1]

They are the products of lorafx.kernels.cpu.dense with integers in the place of a dense weight: few
rows read q once and widen it in registers, and a row is bit-equal in all such batches. For many,
W is made in the dtype of x. Dtypes and groups decide which kernel is generated:

    source(spec, isa) = #defines and constants of spec
                        + vectors.h + epilogue.h + dense_args.h (+ packed.h) + dense.cpp
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafx.errors import LoweringError
from lorafx.kernels.cpu import dense
from lorafx.kernels.cpu.compiler import Isa
from lorafx.kernels.cpu.cpu_source import ELEMENTS, INTEGERS, dtype_code
from lorafx.kernels.cpu.kernels import WIDE, Kernels
from lorafx.kernels.ops.linear_ops import KERNELS
from lorafx.kernels.ops.op_library import BANK, check_bank, check_rows, define, require
from lorafx.torch_internals.graph_parts import unset_fake_temporarily

aten = torch.ops.aten

#: Elements of the longest step of a generated kernel, which no group may cut.
LONGEST_STEP = 32
#: The dtype of bytes that hold two integers each.
PACKED = torch.uint8
#: Weights that stored_mms_delta takes.
MOST_WEIGHTS = 8


@dataclass(frozen=True)
class StoredSpec:
    """What a kernel is generated for: the dtypes of x, q, scale and zero, and whether the last two
    are applied to each number, not to y."""

    dtype: torch.dtype
    integers: torch.dtype
    scale: torch.dtype
    zero: torch.dtype | None
    grouped: bool

    @classmethod
    def of(cls, x: Tensor, weight: Sequence[Tensor]) -> StoredSpec | None:
        """None if no kernel is generated; the tensors may be fake."""
        q, scale, *zero = weight
        spec = cls(
            x.dtype,
            q.dtype,
            scale.dtype,
            zero[0].dtype if zero else None,
            bool(zero) or scale.dim() == 3 or scale.shape[1] > 1,
        )
        floats = spec.dtype in ELEMENTS and spec.scale in ELEMENTS
        zeros = {None, *ELEMENTS, *INTEGERS}
        known = spec.integers in INTEGERS or (spec.integers == PACKED and packed_block())
        return spec if floats and known and spec.zero in zeros else None

    @property
    def key(self) -> int:
        """The key by which dense_op.cpp finds the kernel."""
        zero = 0 if self.zero is None else dtype_code(self.zero) + 1
        codes = dtype_code(self.dtype) | dtype_code(self.scale) << 6 | zero << 12
        return codes | int(self.grouped) << 18 | dtype_code(self.integers) << 19

    @classmethod
    def of_key(cls, key: int) -> StoredSpec:
        names = {dtype_code(dtype): dtype for dtype in (*ELEMENTS, *INTEGERS, PACKED)}
        zero = key >> 12 & 63
        dtypes = names[key & 63], names[key >> 19], names[key >> 6 & 63]
        return cls(*dtypes, names[zero - 1] if zero else None, bool(key >> 18 & 1))


@functools.cache
def packed_block() -> int:
    """The rows of a block in the layout into which torch packs integers of four bits in this
    process; 0 if packed.h does not read it."""
    with unset_fake_temporarily():
        for block in (64, 32):
            q = torch.arange(2 * block, dtype=torch.int32).pow(2).remainder(13).view(block, 2)
            lines = (q[: block // 2] | q[block // 2 :] << 4).T
            packed = aten._convert_weight_to_int4pack_for_cpu(q, 1)
            if torch.equal(packed.view(lines.shape), lines.to(PACKED)):
                return block
    return 0


def source(spec: StoredSpec, isa: Isa) -> str:
    by_pairs = spec.dtype == torch.bfloat16 and isa.dpbf16
    step = "BF16" if by_pairs else "F32"
    if spec.integers == PACKED:
        packed = {"PACKED": 1, "BLOCK": packed_block(), "STORED": 0, "S": ELEMENTS[spec.scale]}
        return dense.source_with(spec, spec.dtype, isa, step, packed, ("packed.h",))
    elements = {**ELEMENTS, **INTEGERS}
    defines = {
        **{
            "PACKED": 0,
            "STORED": 1,
            "GROUPED": int(spec.grouped),
            "HAS_ZERO": int(spec.zero is not None),
        },
        **{"W": elements[spec.integers], "S": elements[spec.scale]},
        "Z": elements[spec.zero or spec.integers],
    }
    return dense.source_with(spec, spec.dtype, isa, step, defines)


@functools.cache
def op_library() -> ctypes.CDLL:
    library = dense.op_library()
    pointers = (ctypes.c_void_p,) * 2
    library.lorafx_add_stored.argtypes = (ctypes.c_int64, ctypes.c_int64, *pointers)
    library.lorafx_install_stored.argtypes = (ctypes.c_void_p,)
    if library.lorafx_install_stored(ctypes.cast(_LOAD, ctypes.c_void_p)):
        raise LoweringError("torch refused the CPU kernels of lorafx::stored_mm")
    return library


@ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int64)
def _LOAD(key: int) -> int:
    """Called where a graph from a cache is the first to need a kernel."""
    return int(not ready(StoredSpec.of_key(key)))


def _enter(spec: StoredSpec, isa: Isa, library: ctypes.CDLL) -> bool:
    functions = library.lorafx_kernel, library.lorafx_widen
    pointers = (ctypes.cast(function, ctypes.c_void_p) for function in functions)
    if op_library().lorafx_add_stored(spec.key, dense.max_rows(spec.dtype), *pointers):
        raise LoweringError("the table of generated CPU kernels is full")
    return True


GENERATED = Kernels("products with integers stay with aten", source, _enter, lanes=WIDE)


def ready(spec: StoredSpec) -> bool:
    """Whether there is a kernel of `spec`, and one of its dtype, which multiplies many rows; both
    are compiled and loaded."""
    return dense.ready(spec.dtype) and bool(GENERATED.ready(spec))


def widened(weight: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """W (N, K) in `dtype`."""
    q, scale, *zero = weight
    groups = q.unflatten(1, (scale.shape[1], -1)).float()
    for offset in zero:
        groups = groups - offset.float()[:, :, None]
    return (groups * scale.float()[:, :, None]).flatten(1).to(dtype)


def product(*operands: Any) -> Tensor:
    """y for the operands (bias (N,),) x (M, K), weight."""
    *bias, x, weight = operands
    spec = StoredSpec.of(x, weight)
    # A graph from a cache may be the first to need the kernel, which then replaces this function.
    if x.device.type == "cpu" and spec is not None and ready(spec):
        y: Tensor = (STORED_ADDMM if bias else STORED_MM)(*operands)
        return y
    product_fake(*operands)
    if weight[0].dtype == PACKED:
        packed, factors = weight
        group = x.shape[1] // factors.shape[0]
        y = aten._weight_int4pack_mm_for_cpu(x, packed, group, factors.to(x.dtype))
        return y + bias[0] if bias else y
    right = widened(weight, x.dtype).T
    return torch.addmm(bias[0], x, right) if bias else torch.mm(x, right)


def product_fake(*operands: Any) -> Tensor:
    *bias, x, weight = operands
    op = "stored_addmm" if bias else "stored_mm"
    require(op, len(weight) in (2, 3), "weight is [integers, scale] or [integers, scale, zero]")
    q, *tables = weight
    require(op, x.dim() == 2 and q.dim() == 2, "x is (M, K), the integers are (N, K)")
    (N, K), shape = q.shape, tuple(tables[0].shape)
    if q.dtype == PACKED:
        K *= 2
        fits = len(tables) == 1 and shape[1:] == (N, 2) and N % 16 == 0
        fits = fits and shape[0] > 0 and K % (shape[0] * LONGEST_STEP) == 0
        require(op, fits, f"scale and zero are (groups, N, 2) of {LONGEST_STEP}s, not {shape}")
    else:
        fits = len(shape) == 2 and shape[0] == N and shape[1] > 0 and K % shape[1] == 0
        require(op, fits, f"scale is (N, groups), not {shape}")
    require(op, x.shape[1] == K, f"x has {x.shape[1]} columns, weight has {K}")
    require(op, all(tuple(table.shape) == shape for table in tables), f"zero is {shape}")
    require(op, all(vector.shape == (N,) for vector in bias), f"bias is ({N},)")
    y: Tensor = x.new_empty(x.shape[0], N)
    return y


def product_and_delta(*arguments: Any) -> Tensor:
    """`product` plus its delta."""
    operands, bank, rows, kernel = dense.split_arguments(arguments)
    *bias, x, weight = operands
    spec = StoredSpec.of(x, weight)
    if x.device.type == "cpu" and kernel in KERNELS and spec is not None and ready(spec):
        joined: Tensor = (STORED_ADDMM_DELTA if bias else STORED_MM_DELTA)(*arguments)
        return joined
    y: Tensor = (STORED_ADDMM if bias else STORED_MM)(*operands)
    torch.ops.lorafx.run_delta_(y, x, *bank, rows, kernel)
    return y


def product_and_delta_fake(*arguments: Any) -> Tensor:
    operands, bank, rows, _ = dense.split_arguments(arguments)
    y = product_fake(*operands)
    check_bank("stored_mm_delta", bank)
    check_rows("stored_mm_delta", y.shape[:-1], y.shape[:-1], rows)
    return y


def products_and_deltas(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    """`product_and_delta` of each weight; one call takes less time than several."""
    *bank, rows, kernels = rest
    parts, tables = len(kernels), len(weights) // max(len(kernels), 1)
    fits = parts > 0 and tables * parts == len(weights) and len(biases) in (0, parts)
    require("stored_mms_delta", fits, "weights, biases and kernels differ in number")
    results = []
    for i, kernel in enumerate(kernels):
        op = STORED_ADDMM_DELTA if biases else STORED_MM_DELTA
        weight = weights[i * tables : (i + 1) * tables]
        results.append(op(*biases[i : i + 1], x, weight, *bank, rows, kernel))
    return results


for _name, _first in (("mm", ""), ("addmm", "Tensor bias, ")):
    _operands = f"{_first}Tensor x, Tensor[] weight"
    define(f"stored_{_name}({_operands}) -> Tensor", product, product_fake, lowered=True)
    define(
        f"stored_{_name}_delta({_operands}, {BANK}, SymInt rows, int kernel) -> Tensor",
        *(product_and_delta, product_and_delta_fake),
        lowered=True,
    )
define(
    f"stored_mms_delta(Tensor x, Tensor[] weights, Tensor[] biases, {BANK}, SymInt rows, "
    "int[] kernels) -> Tensor[]",
    *(products_and_deltas, products_and_deltas),
    lowered=True,
)
STORED_MMS_DELTA = torch.ops.lorafx.stored_mms_delta.default
STORED_MM = torch.ops.lorafx.stored_mm.default
STORED_ADDMM = torch.ops.lorafx.stored_addmm.default
STORED_MM_DELTA = torch.ops.lorafx.stored_mm_delta.default
STORED_ADDMM_DELTA = torch.ops.lorafx.stored_addmm_delta.default
