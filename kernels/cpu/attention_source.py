"""The C++ source of a kernel for attention over a paged cache.

attention_source(spec, isa) = #defines and constants of (dtype, sizes, unit of work)
                              + vectors.h + tiles.h + attention.cpp
"""

from __future__ import annotations

import ctypes

import torch

from lorafx.kernels.cpu.compiler import Isa
from lorafx.kernels.cpu.cpu_source import (
    ELEMENTS,
    constants,
    element_defines,
    templates,
    tile_sizes,
)
from lorafx.kernels.ops.paged_attention import AttentionSpec, PagedStep

# Rows of the cache that are read together at most, where they follow each other: a page or two.
RUN = 32
# Rows of queries times heads in a unit of work: their sums stay in the first-level cache.
MOST = 64
# For as many rows or fewer, keys come as a stream from memory and are asked for ahead of their use.
STREAMED = 4


def spec_of(step: PagedStep) -> AttentionSpec | None:
    """The spec of a step, whose tensors may be fake; None where no kernel is generated: other
    devices, other types than 16- and 32-bit floats, or a mask of another type."""
    query, key, mask = step.query, step.key, step.mask
    heads, size = key.shape[1], key.shape[3]
    if query.dtype not in ELEMENTS or {key.dtype, mask.dtype} != {query.dtype}:
        return None
    if not heads or not size or query.shape[1] % heads or query.device.type != "cpu":
        return None
    return AttentionSpec.of_sizes(step)


class AttentionArgs(ctypes.Structure):
    """`struct Args` of attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "query", "mask", "keys", "values")),
        *((name, ctypes.c_void_p) for name in ("new_keys", "new_values", "read", "write")),
        *((name, ctypes.c_void_p) for name in ("seen", "sinks")),
        *((name, ctypes.c_int64) for name in ("tokens", "count", "key_rows", "value_rows")),
        *((name, ctypes.c_int64) for name in ("query_head", "query_token", "mask_row")),
        *((name, ctypes.c_int64) for name in ("sentinel", "ring", "threads")),
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
        ("parallel", ctypes.c_void_p),
    )


def attention_source(spec: AttentionSpec, isa: Isa) -> str:
    """The complete C++ text of the kernel of `spec` for `isa`."""
    row = spec.heads * spec.size
    sizes = {
        **tile_sizes(isa),
        "K": spec.size,
        "D": spec.size,
        "HEADS": spec.heads,
        "GROUP": spec.group,
        "ROW": row,
        "A_STRIDE": row,
        "B_STRIDE": row,
        "R": RUN,
        "RUN": RUN,
        "MOST": max(MOST, spec.group),
        "PREFETCH_ROWS": STREAMED,
    }
    lines = [
        f"// {isa.name}: {spec}",
        f"#define CAPPED {int(spec.capped)}",
        *element_defines(isa, spec.dtype, spec.dtype, torch.float32),
        *constants(sizes),
        f"static const float HIDDEN = {torch.finfo(spec.dtype).min / 2!r}f;",
    ]
    return "\n".join([*lines, *templates("vectors.h", "tiles.h", "attention.cpp")])
