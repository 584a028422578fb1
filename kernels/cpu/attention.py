"""`lorafx::paged_attention` on a CPU, by a generated kernel; importing this module registers it.

    source(spec, isa) = #defines and constants of (dtype, sizes, unit of work)
                        + vectors.h + tiles.h + attention_args.h + attention.cpp

Where no kernel can be built, the reference of lorafx.kernels.ops.paged_attention runs.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from lorafx.errors import LoweringError
from lorafx.kernels.cpu.compiler import Isa
from lorafx.kernels.cpu.cpu_source import ELEMENTS, kernel_source, tile_sizes
from lorafx.kernels.cpu.kernels import Kernels, with_parallel
from lorafx.kernels.ops.op_library import define_on, require
from lorafx.kernels.ops.paged_attention import AttentionSpec, PagedStep, by_request, check_step

ATTENTION_FILES = ("vectors.h", "tiles.h", "attention_args.h", "attention.cpp")
# The most adjacent rows of the cache that are read together: a page or two.
RUN = 32
# Query rows times heads in a unit of work, whose sums stay in the first-level cache.
UNIT_ROWS = 64
# The most query rows for which keys stream from memory and are prefetched.
PREFETCH_ROWS = 4
#: Why `fixed` attention fails.
NO_FIXED = "there is no generated kernel, which alone has an order of additions that is fixed"


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


def attention_sizes(isa: Isa, size: int, group: int, *, fixed: bool) -> dict[str, int]:
    """The constants of attention.cpp but for distances in memory."""
    return {
        **tile_sizes(isa),
        **{"K": size, "D": size, "GROUP": group, "R": RUN, "RUN": RUN},
        **{"MOST": max(UNIT_ROWS, group), "PREFETCH_ROWS": PREFETCH_ROWS},
        **{"FIXED": int(fixed), "CHAINED": int(fixed)},
    }


def source(spec: AttentionSpec, isa: Isa) -> str:
    row = spec.heads * spec.size
    sizes = {
        **attention_sizes(isa, spec.size, spec.group, fixed=spec.fixed),
        **{"HEADS": spec.heads, "ROW": row, "A_STRIDE": row, "B_STRIDE": row},
    }
    hidden = torch.finfo(spec.dtype).min / 2
    defines = {"CAPPED": int(spec.capped), "HIDDEN": f"({hidden!r}f)"}
    elements = (spec.dtype, spec.dtype, torch.float32)
    return kernel_source(spec, isa, elements, sizes, ATTENTION_FILES, defines)


GENERATED = Kernels("attention over pages stays with aten", source, with_parallel)


def cpu_attention(step: PagedStep) -> Tensor:
    """`paged_attention` on a CPU; it raises what its reference raises."""
    check_step(step)
    kernel = kernel_of(step)
    require("paged_attention", kernel is not None or not step.fixed, NO_FIXED)
    return by_request(step) if kernel is None else run(step, *kernel)


def kernel_of(step: PagedStep) -> tuple[Any, int] | None:
    query, key = step.query, step.key
    if query.dtype not in ELEMENTS or {key.dtype, step.mask.dtype} != {query.dtype}:
        return None
    heads, size = key.shape[1], key.shape[3]
    if not heads or not size or query.shape[1] % heads or query.device.type != "cpu":
        return None
    return GENERATED.ready(AttentionSpec.of_sizes(step))


def run(step: PagedStep, kernel: Any, parallel: int) -> Tensor:
    width = step.key.shape[1] * step.key.shape[3] * step.query.dtype.itemsize
    out = step.empty_result()
    query, mask = (
        part if part.stride(3) == 1 else part.contiguous() for part in (step.query, step.mask)
    )
    new = [part.transpose(1, 2).contiguous() for part in (step.key, step.value)]
    read, write, seen = (part.contiguous() for part in (step.read, step.write, step.seen))
    sinks = None if step.sinks is None else step.sinks.float().contiguous()
    pages, rows = step.cache.data_ptr(), step.cache.numel() // width
    arguments = AttentionArgs(
        *(out.data_ptr(), query.data_ptr(), mask.data_ptr()),
        *(pages + step.first_key * width, pages + step.first_value * width),
        *(part.data_ptr() for part in (*new, read, write, seen)),
        None if sinks is None else sinks.data_ptr(),
        *(query.shape[2], len(read), rows - step.first_key, rows - step.first_value),
        *(query.stride(1), query.stride(2), mask.stride(2)),
        *(step.sentinel, step.ring, torch.get_num_threads()),
        *(step.scale, step.cap, parallel),
    )
    status = kernel(ctypes.byref(arguments))
    if status == 1:
        raise LoweringError("lorafx::paged_attention: out of memory")
    if status:
        raise LoweringError(
            "lorafx::paged_attention: a row to read or write, or a token's range of keys, is "
            f"outside of a cache of {rows} rows or of the {len(read)} that are read"
        )
    return out.transpose(1, 2)


define_on("CPU", "paged_attention", cpu_attention)
