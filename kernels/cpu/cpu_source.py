"""The C++ source of a generated kernel for deltas, and what the sources of all CPU kernels share.

source(spec, isa) = #defines and constants of (dtypes, sizes, ranges, tiles)
                    + vectors.h + tiles.h + rows.h + delta_args.h + delta.cpp
                    + epilogue.h + delta_beside.cpp, where y is a product with a dense weight
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib import resources

import torch

from lorafx.kernels.cpu.compiler import Isa
from lorafx.kernels.ops.delta_spec import DeltaSpec

ELEMENTS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

# Below this many multiply-adds one thread is faster than waking the others (about 3 µs, 2 cores).
SERIAL_WORK = 1 << 15
# With fewer rows per thread than this, a row's planes and columns are shared out instead of rows.
SPLIT_ROWS = 2
# A load of an adapter's factors from memory takes about as long as the work of so many rows that
# find them in a cache (Zen 4, rank 16); 8 and 32 are as good.
LOAD_ROWS = 16
# Up to so many rows the threads share out ranges (q, k, v) one by one: with few adapters, shares of
# whole rows are uneven. A long prompt has rows enough.
FEW_ROWS = 64
# Columns of one unit of work then.
COLUMN_BLOCK = 512
# Bytes that a stream of B is asked for ahead of its use; 512 was best of 0, 128 ... 1024 for decode
# in float32 and bfloat16 (Zen 4, 8 adapters of rank 16, N = 1024 ... 5632).
AHEAD = 512


#: What a kernel of deltas is optimised by where its loops are vectors already: -O3 takes 1.3 times
#: as long to compile it to code that is as fast, to a percent (GCC 12, float32 and bfloat16, ranks
#: 6 and 16, decode and prefill on a Zen 4). Without -fpeel-loops small tiles are 2 % slower.
_VECTORS_ALREADY = ("-O2", "-fpeel-loops")


def flags_of(isa: Isa) -> tuple[str, ...]:
    """The compiler's flags for a kernel of deltas."""
    return (*isa.flags, *_VECTORS_ALREADY) if isa.f16c else isa.flags


def source(spec: DeltaSpec, isa: Isa) -> str:
    """The complete C++ text of the kernel of `spec` for `isa`."""
    starts = [sum(spec.sizes[:j]) for j in range(len(spec.sizes))]
    blocks = sum(-(-size // COLUMN_BLOCK) for size in spec.sizes)
    features = 0 if spec.embedding else len(spec.sizes) * spec.in_features
    sizes = {
        **tile_sizes(isa),
        "K": max(spec.in_features, 1),
        "R": spec.max_rank,
        "G": spec.group,
        "COLUMNS": spec.columns,
        "N": sum(spec.sizes),
        "A_STRIDE": spec.group * max(spec.in_features, 1),
        "B_STRIDE": spec.columns,
        "EXPERTS": spec.experts,
        "PREFETCH_ROWS": isa.tile,
        "RANGES": len(spec.sizes),
        "BLOCK": COLUMN_BLOCK,
        "COLUMN_BLOCKS": blocks,
        "WORK": spec.max_rank * (features + sum(spec.sizes)),
        "SPLIT_ROWS": SPLIT_ROWS,
        "LOAD_ROWS": LOAD_ROWS,
        "FEW_ROWS": FEW_ROWS,
    }
    tables = {
        "SIBLING": spec.siblings,
        "OFFSET": spec.offsets,
        "SIZE": spec.sizes,
        "START": starts,
    }
    lines = [f"// {isa.name}: {spec}", f"#define EMBEDDING {int(spec.embedding)}"]
    lines += [f"#define ROUTED {int(spec.experts > 0)}"]
    lines += element_defines(isa, spec.x_dtype, spec.bank_dtype, spec.y_dtype)
    lines += constants(sizes)
    lines += [
        f"static const long {name}[] = {{{', '.join(map(str, values))}}};"
        for name, values in tables.items()
    ]
    files = ["vectors.h", "tiles.h", "rows.h", "delta_args.h", "delta.cpp"]
    if not spec.embedding and not spec.experts:
        files += ["epilogue.h", "delta_beside.cpp"]
    return "\n".join([*lines, *templates(*files)])


def templates(*names: str) -> list[str]:
    """The texts of these files of this folder."""
    return [_template(name) for name in names]


@functools.cache
def _template(name: str) -> str:
    return resources.files("lorafx.kernels.cpu").joinpath(name).read_text()


def tile_sizes(isa: Isa) -> dict[str, int]:
    """What tiles.h takes of the instruction set, and all kernels alike."""
    return {
        "TILE": isa.tile,
        "PLANES": isa.planes,
        "PAIRS": isa.pairs,
        "AHEAD": AHEAD,
        "SERIAL_WORK": SERIAL_WORK,
    }


def element_defines(isa: Isa, x: torch.dtype, factors: torch.dtype, y: torch.dtype) -> list[str]:
    """The lines that vectors.h needs: lanes, instructions, element types of x, factors and y."""
    values = {
        "LANES": isa.lanes,
        "HAS_F16C": int(isa.f16c),
        "HAS_DPBF16": int(isa.dpbf16),
        "X": ELEMENTS[x],
        "W": ELEMENTS[factors],
        "Y": ELEMENTS[y],
    }
    return [f"#define {name} {value}" for name, value in values.items()]


def constants(values: Mapping[str, int]) -> list[str]:
    """The lines that give a template its sizes."""
    return [f"static const long {name} = {value};" for name, value in values.items()]
