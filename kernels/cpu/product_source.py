"""The C++ source of a kernel for sorted rows times the weights of their experts.

product_source(spec, isa) = #defines and constants of (dtype, sizes, unit of work)
                            + vectors.h + tiles.h + product.cpp
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafx.kernels.cpu.compiler import Isa
from lorafx.kernels.cpu.cpu_source import (
    ELEMENTS,
    constants,
    element_defines,
    templates,
    tile_sizes,
)

# Columns of a unit of work: their weights stay in a cache while an expert's rows go through them.
UNIT = 64


@dataclass(frozen=True)
class ProductSpec:
    """What a generated kernel for y[m] = W_e x[m] takes for granted.

    Attributes:
        dtype: of x, W and y.
        in_features, out_features: K and N; W is (E, N, K).
    """

    dtype: torch.dtype
    in_features: int
    out_features: int

    @classmethod
    def of(cls, x: Tensor, weight: Tensor) -> ProductSpec | None:
        """The spec for x (M, K) and weight (E, K, N); None where no kernel is generated: other
        types than 16- and 32-bit floats, weights that do not lie as (E, N, K), strided rows."""
        _, K, N = weight.shape
        laid = weight.stride() == (K * N, 1, K) or weight.numel() == 0
        rows = x.stride(1) == 1 and x.stride(0) >= 0
        if x.dtype not in ELEMENTS or not laid or not rows or not K or not N:
            return None
        return cls(x.dtype, K, N)


class ProductArgs(ctypes.Structure):
    """`struct Args` of product.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("y", "x", "w", "ends")),
        *((name, ctypes.c_int64) for name in ("x_stride", "experts", "threads")),
        ("parallel", ctypes.c_void_p),
    )


def product_source(spec: ProductSpec, isa: Isa) -> str:
    """The complete C++ text of the kernel of `spec` for `isa`."""
    sizes = {
        **tile_sizes(isa),
        "K": spec.in_features,
        "N": spec.out_features,
        "R": UNIT,
        "A_STRIDE": spec.in_features,
        "B_STRIDE": UNIT,
        "PREFETCH_ROWS": isa.tile,
    }
    texts = templates("vectors.h", "tiles.h", "product.cpp")
    defines = element_defines(isa, spec.dtype, spec.dtype, spec.dtype)
    return "\n".join([f"// {isa.name}: {spec}", *defines, *constants(sizes), *texts])
