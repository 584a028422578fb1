"""`lorafx::grouped_mm`, the product of rows, sorted by expert, with the weights of the experts.

    y[m] = x[m] W_e    for offs[e - 1] ≤ m < offs[e],    0 behind the last

    source(spec, isa) = #defines and constants of (dtype, sizes, unit of work)
                        + vectors.h + tiles.h + product.cpp

On a CPU a generated kernel reads each weight once. Elsewhere, for dtypes that `aten._grouped_mm`
does not take, it is a loop over the experts that have rows, and the host waits for offs.
"""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafx.errors import LoweringError
from lorafx.kernels.cpu.compiler import Isa
from lorafx.kernels.cpu.cpu_source import ELEMENTS, kernel_source, tile_sizes
from lorafx.kernels.cpu.kernels import Kernels, with_parallel
from lorafx.kernels.cpu.weight_mm import product
from lorafx.kernels.ops.op_library import define, require
from lorafx.torch_internals.cpu import has_matrix_tiles

# Columns of a unit of work, whose weights stay in a cache while the expert's rows are multiplied.
UNIT = 64
#: Rows per expert from which on torch.mm is as fast as the generated kernel, which is 2 to 5 times
#: as fast for one row, 1.2 to 2 times for 32 (Zen 4, two cores, float32 and bfloat16, 32 and 64
#: experts of 384 × 1024 to 1024 × 768). Below it the order of a row's sums is fixed, from there on
#: it is that of weight_mm, and for experts with more than its MAX_ROWS that of torch.mm.
MANY_ROWS = 256
#: The same for bfloat16 on a CPU with matrix tiles, which products of one expert use: by them it
#: takes 1.2 to 1.3 of the kernel's time for four rows, 0.72 to 0.93 for eight, 0.6 for 16 (Sapphire
#: Rapids, two threads, 64 experts of 384 × 1024 and 1024 × 768).
MANY_ROWS_BESIDE_TILES = 8


@dataclass(frozen=True)
class ProductSpec:
    """A generated kernel of y[m] = W_e x[m], for W (E, N, K); `stored`: of int8, with scales by
    row (E, N), float32."""

    dtype: torch.dtype
    in_features: int
    out_features: int
    stored: bool = False

    @classmethod
    def of(cls, x: Tensor, weight: Tensor) -> ProductSpec | None:
        """None if no kernel is generated: for other dtypes, strided rows, another layout of W."""
        _, K, N = weight.shape
        has_layout = weight.stride() == (K * N, 1, K) or weight.numel() == 0
        has_rows = x.stride(1) == 1 and x.stride(0) >= 0
        if x.dtype not in ELEMENTS or not has_layout or not has_rows or not K or not N:
            return None
        return cls(x.dtype, K, N)


class ProductArgs(ctypes.Structure):
    """`struct Args` of product.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("y", "x", "w", "ends", "scales")),
        *((name, ctypes.c_int64) for name in ("x_stride", "experts", "threads")),
        ("parallel", ctypes.c_void_p),
    )


def source(spec: ProductSpec, isa: Isa) -> str:
    sizes = {
        **tile_sizes(isa),
        "K": spec.in_features,
        "N": spec.out_features,
        "R": UNIT,
        "A_STRIDE": spec.in_features,
        "B_STRIDE": UNIT,
        "PREFETCH_ROWS": isa.tile,
        "STREAMS": isa.streams,  # unlike factors and keys, weights are not in a cache
    }
    files = ("vectors.h", "tiles.h", "product.cpp")
    defines = {"STORED": int(spec.stored), **({"W": "I8"} if spec.stored else {})}
    return kernel_source(spec, isa, (spec.dtype,) * 3, sizes, files, defines)


GENERATED = Kernels("products with the weights of experts stay with aten", source, with_parallel)


def kernel_of(x: Tensor, weight: Tensor) -> tuple[Any, int] | None:
    on_cpu = x.device.type == weight.device.type == "cpu"
    spec = ProductSpec.of(x, weight) if on_cpu else None
    return None if spec is None else GENERATED.ready(spec)


def run(y: Tensor, x: Tensor, weight: Tensor, offs: Tensor, *call: Any) -> None:
    """`call`: the kernel, torch's function that shares out work, and scales of a stored weight."""
    kernel, parallel, *scales = call
    offs = offs.contiguous()
    pointers = (tensor.data_ptr() for tensor in (y, x, weight, offs, *(scales or [weight])))
    sizes = x.stride(0), len(offs), torch.get_num_threads()
    if kernel(ctypes.byref(ProductArgs(*pointers, *sizes, parallel))):
        raise LoweringError("lorafx::grouped_mm: out of memory")


def grouped_mm(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """y (M, N) for x (M, K), sorted by expert, weight (E, K, N) and offs, int32 (E,), the ends of
    the experts' rows. Raises LoweringError for an end behind the last row."""
    _check(x, weight, offs)
    groups = groups_of("grouped_mm", offs, len(x))
    y = x.new_empty(x.shape[0], weight.shape[2])
    y[groups[-1][1] if groups else 0 :].zero_()
    matrix_tiles = x.dtype == torch.bfloat16 and has_matrix_tiles()
    many = (MANY_ROWS_BESIDE_TILES if matrix_tiles else MANY_ROWS) * len(groups)
    kernel = kernel_of(x, weight) if len(x) < many else None
    if kernel is not None:
        run(y, x, weight, offs, *kernel)
        return y
    for expert, (start, end) in enumerate(groups):
        if end > start:
            y[start:end] = product(x[start:end], weight[expert].T)
    return y


def groups_of(op: str, offs: Tensor, rows: int) -> list[tuple[int, int]]:
    """Where the rows of each expert begin and end. Raises LoweringError if that is not in order."""
    groups = list(itertools.pairwise([0, *offs.tolist()]))
    for start, end in groups:
        if not start <= end <= rows:
            raise LoweringError(f"lorafx::{op}: offs ends at {end}, of {rows} rows")
    return groups


def grouped_mm_fake(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    _check(x, weight, offs)
    return x.new_empty(x.shape[0], weight.shape[2])


def _check(x: Tensor, weight: Tensor, offs: Tensor) -> None:
    op = "grouped_mm"
    require(op, x.dim() == 2 and weight.dim() == 3, "input is (M, K), weight (E, K, N)")
    K = weight.shape[1]
    require(op, x.shape[1] == K, f"x has {x.shape[1]} columns, weight has {K}")
    require(op, offs.shape == weight.shape[:1], f"offs is (E,), not {tuple(offs.shape)}")
    require(op, x.dtype == weight.dtype, f"x is {x.dtype}, weight {weight.dtype}")
    require(op, offs.dtype == torch.int32, f"offs is int32, not {offs.dtype}")


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    """Of x: the product with the transposed weights. Of the weights: a product per expert."""
    x, weight, offs = ctx.saved_tensors
    of_x = of_weight = None
    _, x_needs, weight_needs, _ = ctx.needs_input_grad  # the first is the op itself
    if x_needs:
        of_x = GROUPED_MM(grad, weight.transpose(1, 2), offs)
    if weight_needs:
        groups = groups_of("grouped_mm", offs, len(x))
        of_weight = torch.stack([x[start:end].T @ grad[start:end] for start, end in groups])
    return of_x, of_weight, None


_SCHEMA = "grouped_mm(Tensor input, Tensor weight, Tensor offs) -> Tensor"
define(_SCHEMA, grouped_mm, grouped_mm_fake, _gradients, _save_for_backward)
GROUPED_MM = torch.ops.lorafx.grouped_mm.default
