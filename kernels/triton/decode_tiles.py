"""Tiles of a decode step's linear: base product in parts of K, shrink, and what adds them up."""

from __future__ import annotations

from dataclasses import replace

from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.kernels.triton.triton_tiles import (
    Architecture,
    Tiles,
    aligned,
    power_of_two,
    shrink_tiles,
    stages_that_fit,
)

#: A load of so many ranks takes no longer than one of those that a tile needs.
SLOTS_AT_ONCE = 64


def split_tiles(spec: DeltaSpec, rows: int, arch: Architecture) -> dict[str, Tiles]:
    """Tiles of "split" and "reduce".

    Each program of the base product reads x again, so W's tile is the wide one; as many parts of K
    as give one and a half programs a processor, what leaves the shrink's programs a place. Found by
    sweeps on an H200 (Llama-3-8B's linears, 1 and 64 rows), as are the reader's wide tiles of 16
    rows, of 64 sorted by slot: they read each adapter's B about once. That several adapters are
    multiplied at once, and ranks read beside slots, was not timed.
    """
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
