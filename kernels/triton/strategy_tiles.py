"""The kernels that each strategy launches, and their tiles: tuned ones, or the heuristic's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.kernels.triton.decode_tiles import split_tiles
from lorafx.kernels.triton.triton_tiles import (
    Architecture,
    Tiles,
    concat_tiles,
    expand_rows_tiles,
    grouped_tiles,
    linear_tiles,
    power_of_two,
    shrink_rows_tiles,
    shrink_tiles,
)

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
    """Where `TUNED` keeps the tiles of a node."""
    return strategy, arch.name, spec, power_of_two(rows, 1, 1 << 20)


def tiles_for(strategy: str, spec: DeltaSpec, rows: int, arch: Architecture) -> dict[str, Tiles]:
    """Tiles of each kernel of `strategy` for about `rows` rows, tuned ones before the heuristic's.

    Rows are sorted by slot where a tile does nothing but its adapters' work; where the base product
    is in the same tile, more adapters a tile cost little beside it.
    """
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
        return dict(
            zip(STRATEGY_KERNELS[strategy], grouped_tiles(spec, rows, arch, strategy), strict=True)
        )
    first = shrink_tiles(spec, rows, arch)
    ordered = strategy == "segments" and rows > first.block_m
    first = replace(first, ordered=ordered, overlap=arch.overlaps)
    name, *readers = STRATEGY_KERNELS[strategy]
    tiles = {name: first}
    for reader in readers:
        second = linear_tiles(spec, rows, arch, reader)
        tiles[reader] = replace(second, parts=first.parts, ordered=ordered, overlap=arch.overlaps)
    return tiles
