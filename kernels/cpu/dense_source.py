"""The C++ source of a kernel for few rows times a dense weight.

dense_source(dtype, isa) = #defines and constants of (dtype, tiles)
                           + vectors.h + epilogue.h + dense_args.h + dense.cpp
"""

from __future__ import annotations

import torch

from lorafx.kernels.cpu.compiler import Isa
from lorafx.kernels.cpu.cpu_source import (
    ELEMENTS,
    SERIAL_WORK,
    constants,
    element_defines,
    templates,
)

#: Bytes of W in a unit of work, which later tiles of rows find in a cache of the core.
UNIT_BYTES = 1 << 18
#: Columns of y that an epilogue takes at once; 64 to 1024 are as good (Zen 4, 16 rows, float32).
EPILOGUE_COLUMNS = 256
#: How often a thread looks whether the others are done before it lets another one run.
SPINS = 1 << 10


def dense_source(dtype: torch.dtype, isa: Isa) -> str:
    """The complete C++ text of the kernel for x, W and y of `dtype` for `isa`."""
    # A conversion of x for each column costs more than one pass over x.
    widened = dtype == torch.float16
    sizes = {
        "TILE": 6 if isa.lanes == 16 else 4,
        "ACCUMULATORS": 24 if isa.lanes == 16 else 12,
        "UNIT_BYTES": UNIT_BYTES,
        "SERIAL_WORK": SERIAL_WORK,
        "EPILOGUE_COLUMNS": EPILOGUE_COLUMNS,
        "SPINS": SPINS,
    }
    defines = [
        *element_defines(isa, dtype, dtype, dtype),
        f"#define E {'F32' if widened else ELEMENTS[dtype]}",
        f"#define WIDENED {int(widened)}",
    ]
    texts = templates("vectors.h", "epilogue.h", "dense_args.h", "dense.cpp")
    return "\n".join([f"// {isa.name}: {dtype}", *defines, *constants(sizes), *texts])
