"""The C++ source of a kernel for one adapter whose factors lie as they were trained.

factor_source(spec, isa) = #defines and constants of (dtypes, sizes, panel)
                           + vectors.h + tiles.h + rows.h + factors.cpp
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafx.kernels.compiler import Isa
from lorafx.kernels.cpu_source import (
    ELEMENTS,
    constants,
    element_defines,
    templates,
    tile_sizes,
)

# Bytes of a transposed panel of B: with the rows of v and y it has to stay in a 32 KiB cache.
PANEL_BYTES = 16 << 10
# Floats of v that are on the stack.
SMALL = 4096
# Panels are on the stack of a thread.
MAX_RANK = 512


@dataclass(frozen=True)
class FactorSpec:
    """What a generated kernel for y += scale · (x Aᵀ) Bᵀ takes for granted.

    Attributes:
        x_dtype, factor_dtype, y_dtype: of x, of A and B, of y.
        in_features: K; A is (r, K).
        rank: r.
        out_features: N; B is (N, r).
        contiguous: A and B are.
    """

    x_dtype: torch.dtype
    factor_dtype: torch.dtype
    y_dtype: torch.dtype
    in_features: int
    rank: int
    out_features: int
    contiguous: bool = True

    @classmethod
    def of(cls, y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> FactorSpec:
        """The spec of an `add_factors_` call; the tensors may be fake, only metadata is read."""
        rank, in_features = A.shape
        sizes = int(in_features), int(rank), int(B.shape[0])
        return cls(x.dtype, A.dtype, y.dtype, *sizes, A.is_contiguous() and B.is_contiguous())

    def supported(self) -> bool:
        """Whether kernels are generated for it: 16- and 32-bit floats, nothing empty or strided."""
        dtypes = (self.x_dtype, self.factor_dtype, self.y_dtype)
        sizes = (self.in_features, self.rank, self.out_features)
        return (
            self.contiguous
            and all(dtype in ELEMENTS for dtype in dtypes)
            and min(sizes) > 0
            and self.rank <= MAX_RANK
        )


def panel_columns(spec: FactorSpec, isa: Isa) -> int:
    """Columns of B that are transposed at a time: whole units of the tiles."""
    unit = 2 * isa.lanes * isa.pairs
    fitting = PANEL_BYTES // (spec.rank * spec.factor_dtype.itemsize)
    return max(unit, fitting // unit * unit)


def factor_source(spec: FactorSpec, isa: Isa) -> str:
    """The complete C++ text of the kernel of `spec` for `isa`."""
    panel = panel_columns(spec, isa)
    sizes = {
        **tile_sizes(isa),
        "K": spec.in_features,
        "R": spec.rank,
        "N": spec.out_features,
        "PANEL": panel,
        "B_STRIDE": panel,
        # A is read once a call, so all tiles ask for its planes ahead (8 rows, float32, one thread,
        # hidden 1024, over the base products alone: 1.057 without, 1.04 with; a busy machine)
        "PREFETCH_ROWS": isa.tile,
        "B_PREFETCH_ROWS": 2,
        "SMALL": SMALL,
    }
    texts = templates("vectors.h", "tiles.h", "rows.h", "factors.cpp")
    defines = element_defines(isa, spec.x_dtype, spec.factor_dtype, spec.y_dtype)
    return "\n".join([f"// {isa.name}: {spec}", *defines, *constants(sizes), *texts])
