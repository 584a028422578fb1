"""Generated CPU kernels of deltas: from a spec to an id, which the `run` ops take.

    build(spec) = id, a hash of the source, so that graphs in a cache on disk stay valid

    source(spec, isa) = #defines and constants of (dtypes, sizes, ranges, tiles)
                        + vectors.h + tiles.h + rows.h + delta_args.h + delta.cpp
                        + epilogue.h + delta_beside.cpp, where y is a product with a dense weight

Kernels are loaded into each process before its graphs run, and registered by id in the table of the
dispatcher (dispatcher.cpp). If no compiler works, `build` returns None after one warning, and
`delta_call` returns the aten op.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from lorafx.errors import LoweringError
from lorafx.kernels.cpu.compiler import Isa, best_isa, compile_library
from lorafx.kernels.cpu.cpu_source import (
    add_kernel,
    address,
    dtype_code,
    kernel_source,
    op_source,
    register,
    tile_sizes,
)
from lorafx.kernels.cpu.kernels import LOCK, Kernels
from lorafx.kernels.ops import linear_ops
from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.kernels.ops.op_library import Ranges

# With fewer rows per thread than this, threads share planes and columns of a row instead of rows.
SPLIT_ROWS = 2
# Loading an adapter's factors from memory takes about as long as computing this many rows with
# factors in a cache (Zen 4, rank 16); 8 and 32 are as good.
LOAD_ROWS = 16
# Up to this many rows threads share the ranges (q, k, v) one by one, since with few adapters shares
# of whole rows are uneven.
FEW_ROWS = 64
# Columns of a unit of work, up to FEW_ROWS rows.
COLUMN_BLOCK = 512
#: Flags for code whose loops are vectors already: -O3 takes 1.3 times as long to compile for equal
#: speed (GCC 12, float32 and bfloat16, ranks 6 and 16, decode and prefill on a Zen 4). Without
#: -fpeel-loops small tiles are 2 % slower.
_VECTOR_FLAGS = ("-O2", "-fpeel-loops")


def source(spec: DeltaSpec, isa: Isa) -> str:
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
        # Of eight adapters a product takes 1.24 instead of 1.30 of none (Zen 3, cold factors).
        "STREAMS": isa.streams if isa.lanes == 8 else 0,
        "RANGES": len(spec.sizes),
        "BLOCK": COLUMN_BLOCK,
        "COLUMN_BLOCKS": sum(-(-size // COLUMN_BLOCK) for size in spec.sizes),
        "WORK": spec.max_rank * (features + sum(spec.sizes)),
        "SPLIT_ROWS": SPLIT_ROWS,
        "LOAD_ROWS": LOAD_ROWS,
        "FEW_ROWS": FEW_ROWS,
    }
    tables = {
        "SIBLING": spec.siblings,
        "OFFSET": spec.offsets,
        "SIZE": spec.sizes,
        "START": [sum(spec.sizes[:j]) for j in range(len(spec.sizes))],
    }
    files = ["vectors.h", "tiles.h", "rows.h", "delta_args.h", "delta.cpp"]
    if not spec.embedding and not spec.experts:
        files += ["epilogue.h", "delta_beside.cpp"]
    defines = {"EMBEDDING": int(spec.embedding), "ROUTED": int(spec.experts > 0)}
    arrays = [
        f"static const long {name}[] = {{{', '.join(map(str, values))}}};"
        for name, values in tables.items()
    ]
    elements = (spec.x_dtype, spec.bank_dtype, spec.y_dtype)
    return "\n".join([*arrays, kernel_source(spec, isa, elements, sizes, files, defines)])


DISPATCHER = ("rows.h", "delta_args.h", "epilogue.h", "dispatcher.cpp")

_RECORDINGS: list[dict[DeltaSpec, int]] = []


@functools.cache
def dispatcher() -> ctypes.CDLL:
    return register("lorafx::run_delta_", DISPATCHER)


def _flags(isa: Isa) -> tuple[str, ...]:
    return (*isa.flags, *_VECTOR_FLAGS) if isa.f16c else isa.flags


def _enter(spec: DeltaSpec, isa: Isa, library: ctypes.CDLL) -> int:
    text = "\0".join((source(spec, isa), *_flags(isa)))
    kernel = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") + 1
    functions = (getattr(library, f"lorafx_{name}", None) for name in ("kernel", "begin", "end"))
    numbers = (
        2 if spec.experts else int(spec.embedding),  # `enum Op` of dispatcher.cpp
        *(spec.in_features, sum(spec.sizes), spec.max_rank, spec.group, spec.columns),
        *(max(spec.siblings) + 1, spec.last_column, spec.experts),
    )
    dtypes = spec.x_dtype, spec.bank_dtype, spec.y_dtype, torch.int32, torch.int64, torch.float32
    words = *map(address, functions), *numbers, *map(dtype_code, dtypes)
    add_kernel(dispatcher(), (kernel,), *words)
    linear_ops.KERNELS[kernel] = Ranges(spec.siblings, spec.offsets, spec.sizes)
    return kernel


GENERATED = Kernels(
    "LoRA runs in plain aten on this CPU, which is slow", source, _enter, flags=_flags
)


@contextlib.contextmanager
def builds_noted() -> Iterator[dict[DeltaSpec, int]]:
    """Records the kernels that `build` returns in the block, on any thread, with their ids."""
    kernels: dict[DeltaSpec, int] = {}
    _RECORDINGS.append(kernels)
    try:
        yield kernels
    finally:
        _RECORDINGS.remove(kernels)


def build(spec: DeltaSpec, isa: Isa | None = None) -> int | None:
    """The id of the kernel of `spec`, which is loaded into this process; None if kernels are not
    generated for it (float64, empty ranges), or no compiler works (one warning)."""
    if not spec.supported():
        return None
    with LOCK:
        kernel = GENERATED.ready(spec, isa, again=True)
        if kernel is not None:
            for recording in _RECORDINGS:
                recording[spec] = kernel
        return kernel


def built_source(spec: DeltaSpec) -> str:
    return source(spec, best_isa())


def build_all(specs: Iterable[DeltaSpec]) -> dict[DeltaSpec, int | None]:
    unique = list(dict.fromkeys(specs))
    from lorafx.torch_internals.compat import inductor_config

    with contextlib.suppress(LoweringError):  # `build` fails again, and warns
        isa = best_isa()
        todo = [spec for spec in unique if spec.supported() and not GENERATED.has(spec)]
        # A process that compiles beside calls has one thread for it.
        with ThreadPoolExecutor(inductor_config.compile_threads) as pool:
            jobs: list[Future[Any]] = [pool.submit(GENERATED.compile, spec, isa) for spec in todo]
            if todo:
                jobs.append(pool.submit(compile_library, op_source(DISPATCHER)))
            for job in jobs:
                job.exception()
    return {spec: build(spec) for spec in unique}


def delta_call(spec: DeltaSpec, *tensors: Any, rows: Any, ends: bool = False) -> Any:
    """The op for the delta of `spec`, and its arguments: `tensors` (or graph nodes) and those
    behind. Without a kernel, or for a literal `rows` of 0, which only aten checks, the op is
    aten's; for routed rows the result is None then."""
    kernel = None if isinstance(rows, int) and rows == 0 else build(spec)
    op = torch.ops.lorafx
    if spec.experts:
        arguments = (*tensors, rows, spec.experts, ends, kernel)
        return None if kernel is None else (op.run_expert_delta_.default, arguments)
    if kernel is not None:
        run = op.run_embedding_delta_ if spec.embedding else op.run_delta_
        return run.default, (*tensors, rows, kernel)
    if spec.embedding:
        return op.add_embedding_delta_.default, (*tensors, rows)
    ranges = (list(spec.siblings), list(spec.offsets), list(spec.sizes))
    return op.add_delta_.default, (*tensors, *ranges, rows)
