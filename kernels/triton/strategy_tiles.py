"""The kernels that each strategy launches, and their tiles: tuned ones, or the heuristic's.

Tuned tiles are kept in lorafx's cache folder, a file for each architecture and set of versions.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lorafx.kernels.cpu.compiler import cache_folder
from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.kernels.triton.source import generator_hash
from lorafx.kernels.triton.tiles import (
    Architecture,
    Tiles,
    aligned,
    concat_tiles,
    expand_rows_tiles,
    grouped_tiles,
    linear_tiles,
    power_of_two,
    shrink_rows_tiles,
    shrink_tiles,
    stages_that_fit,
)
from lorafx.torch_internals import triton_compat

#: A load of this many ranks takes no longer than a load of those that a tile needs.
SLOTS_AT_ONCE = 64


def split_tiles(spec: DeltaSpec, rows: int, arch: Architecture) -> dict[str, Tiles]:
    """Tiles of "split" and "reduce". Each program of the base product reads x again, so W's tile is
    the wide one; parts of K give one and a half programs a processor. Found by sweeps on an H200
    (Llama-3-8B's linears, 1 and 64 rows); several adapters in one product were not timed."""
    shrink = shrink_tiles(spec, rows, arch)
    columns, size = sum(spec.sizes), spec.x_dtype.itemsize
    planes = len(spec.sizes) * spec.max_rank
    block_r = power_of_two(spec.max_rank, 16, 64) if spec.max_rank <= 64 else 16
    if arch.name == "interpreter":
        first = replace(shrink, block_n=power_of_two(columns, 16, 128), split=2)
        wide = power_of_two(max(spec.sizes), 16, 128)
        window = 64 if rows > 16 else 0
        second = Tiles(16, wide, block_r=max(block_r, 32), group_m=2, window=window)
    else:
        small = size == 4 or spec.bank_dtype.itemsize == 4 or not aligned(spec)
        block_n = 32 if small else 128 if columns >= 16384 or rows <= 16 else 64
        block_k = 32 if small else 64
        num_warps = 8 if block_n == 128 and rows <= 16 else 4
        programs = -(-columns // block_n) * -(-rows // shrink.block_m)
        most = min(arch.processors * 3 // 2 // programs, -(-spec.in_features // block_k) // 4)
        split = 1 << max(min(most, 8), 1).bit_length() - 1
        stages = stages_that_fit(arch, 2 * block_k * (shrink.block_m + block_n) * size, 5)
        first = replace(
            shrink,
            block_n=block_n,
            block_k=block_k,
            block_r=16 if small else power_of_two(planes, 16, 64 if rows > 16 else 16),
            parts=4,
            split=split,
            picked=16 if rows > 16 else 0,
            swap=True,
            num_warps=num_warps,
            num_stages=stages,
        )
        many = columns >= 16384 and rows > 16 and block_r == 16
        wide = 32 if small else 256 if many else 128
        window = 64 if rows > 16 and not small else 0
        # Several adapters of a tile in one product. More of them, or more warps, for tiles of 256
        # columns take so many registers that no program starts beside the kernel before it.
        abreast = 16 if small or spec.max_rank > 64 else 64 if wide <= 128 else 32
        second = Tiles(16, wide, block_r=max(block_r, abreast), window=window, num_stages=1)
    second = replace(
        second, parts=first.parts, split=first.split, batched=True, at_once=SLOTS_AT_ONCE
    )
    both = {"split": first, "reduce": second}
    return {name: replace(tiles, overlap=arch.overlaps) for name, tiles in both.items()}


# strategy -> the kernels that it launches, in order
STRATEGY_KERNELS: Mapping[str, tuple[str, ...]] = {
    "split": ("split", "reduce"),
    "epilogue": ("shrink", "epilogue"),
    "recompute": ("recompute",),
    "segments": ("shrink", "expand"),
    "concat": ("gather", "place"),
    "gemv": ("shrink_rows", "expand_rows"),
    "embedding": ("embedding_rows",),
    "grouped": ("shrink", "epilogue"),
    "activated": ("activate", "epilogue"),
}

# What a tuner measured: (strategy, architecture, spec, M rounded up to a power of two) -> tiles
Key = tuple[str, str, DeltaSpec, int]
TUNED: dict[Key, dict[str, Tiles]] = {}


def tuning_key(strategy: str, arch: Architecture, spec: DeltaSpec, rows: int) -> Key:
    return strategy, arch.name, spec, power_of_two(rows, 1, 1 << 20)


def tiles_for(strategy: str, spec: DeltaSpec, rows: int, arch: Architecture) -> dict[str, Tiles]:
    """Tiles of each kernel of `strategy` for about `rows` rows, tuned or the heuristic's."""
    rows = max(rows, 1)  # of one expert, in "grouped" and "activated"
    tuned = TUNED.get(tuning_key(strategy, arch, spec, rows))
    if tuned is not None:
        return dict(tuned)
    if strategy == "embedding":
        return {"embedding_rows": expand_rows_tiles(spec, rows, arch)}
    if strategy == "recompute":
        return {"recompute": linear_tiles(spec, rows, arch, "recompute")}
    if strategy == "gemv":
        first = shrink_rows_tiles(spec, rows, arch)
        second = expand_rows_tiles(spec, rows, arch)
        both = {"shrink_rows": first, "expand_rows": replace(second, parts=first.parts)}
        return {name: replace(t, overlap=arch.overlaps) for name, t in both.items()}
    if strategy == "concat":
        return concat_tiles(spec, rows, arch)
    if strategy == "split":
        return split_tiles(spec, rows, arch)
    if strategy in ("grouped", "activated"):
        pair = grouped_tiles(spec, rows, arch, strategy)
        return dict(zip(STRATEGY_KERNELS[strategy], pair, strict=True))
    first = shrink_tiles(spec, rows, arch)
    ordered = strategy == "segments" and rows > first.block_m
    first = replace(first, ordered=ordered, overlap=arch.overlaps)
    name, reader = STRATEGY_KERNELS[strategy]
    second = linear_tiles(spec, rows, arch, reader)
    second = replace(second, parts=first.parts, ordered=ordered, overlap=arch.overlaps)
    return {name: first, reader: second}


def tuned_file(arch: Architecture) -> Path:
    versions = f"triton{triton_compat.version()}-torch{torch.__version__}-{generator_hash()[:8]}"
    return cache_folder() / "tuned" / f"{arch.name}-{arch.processors}-{versions}.json"


@functools.cache
def load_tuned(arch: Architecture) -> int:
    path = tuned_file(arch)
    if not path.exists():
        return 0
    try:
        rows = [_winner(row) for row in json.loads(path.read_text())]
    except (ValueError, TypeError, KeyError, AttributeError):
        return 0  # damaged, or of other fields than today's: the heuristic's tiles are right too
    for (strategy, spec, bucket), tiles in rows:
        TUNED.setdefault((strategy, arch.name, spec, bucket), tiles)
    return len(rows)


def _winner(row: Any) -> tuple[tuple[str, DeltaSpec, int], dict[str, Tiles]]:
    spec = DeltaSpec(**{k: _typed(k, v) for k, v in row["spec"].items()})
    tiles = {name: Tiles(**own) for name, own in row["tiles"].items()}
    return (row["strategy"], spec, row["rows"]), tiles


def _typed(name: str, value: Any) -> Any:
    if name.endswith("dtype"):
        return getattr(torch, value)
    return tuple(value) if isinstance(value, list) else value
