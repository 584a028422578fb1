"""Tiles of "persistent": a product of our own for many rows, meant to be as fast as the vendor's.

    registers      sums (BLOCK_M · BLOCK_N / threads) and one slice's delta
    shared memory  stages · BLOCK_K · (BLOCK_M + BLOCK_N) elements, one slice of y, v and B
    tensor memory  on Blackwell: sums of this tile and of its slices' deltas, 512 columns in all

None was timed yet: the first of `persistent_variants` is what ahead-of-time compilation likes best
(no spills, wgmma or tcgen05 fed by TMA), the others are for a tuner's clock.
"""

from __future__ import annotations

from dataclasses import replace

from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.kernels.triton.triton_tiles import (
    Architecture,
    Tiles,
    linear_tiles,
    power_of_two,
    shrink_tiles,
)

#: Where loads by descriptor are TMA's; and the interpreter, which checks their alignment.
CHIPS_WITH_TMA = ("cuda90", "cuda100", "interpreter")

#: Rows up to which wide tiles leave processors idle, and v comes in several planes, which take the
#: registers that wide tiles do not have.
FEW = 1024


def aligned_rows(spec: DeltaSpec) -> bool:
    """Whether rows of x, of W (N, K) or (K, N), and of y can begin at multiples of 16 bytes."""
    sizes = (spec.in_features, sum(spec.sizes))
    return all(n * spec.x_dtype.itemsize % 16 == 0 for n in sizes)


def persistent_variants(spec: DeltaSpec, rows: int, arch: Architecture) -> tuple[Tiles, ...]:
    """Tiles of the kernel that are worth timing, the heuristic's choice first."""
    width = max(spec.sizes)
    tma = arch.name in CHIPS_WITH_TMA and aligned_rows(spec)
    if arch.name == "interpreter":
        tiles = Tiles(
            block_m=power_of_two(rows, 16, 64),
            block_n=power_of_two(width, 16, 128),
            block_k=power_of_two(spec.in_features, 16, 256),
            block_r=power_of_two(spec.max_rank, 16, 64),
            group_m=2,
            programs=3,
            slices=2,
            early=True,
            tma=tma,
        )
        return (tiles, replace(tiles, slices=4, early=False))
    half = spec.x_dtype.itemsize == 2 and spec.bank_dtype == spec.y_dtype == spec.x_dtype
    if not tma or not half:
        plain = linear_tiles(spec, rows, arch, "epilogue")
        slices = 2 if plain.block_n >= 64 else 1
        warps = 8 if spec.x_dtype.itemsize == 4 else plain.num_warps
        plain = replace(plain, swap=False, num_warps=warps, slices=slices)
        return (replace(plain, programs=arch.processors),)
    # Slots are found before the product and their ranks, so that v and B are on their way at once
    # when it ends; of v and B no more than that, for want of registers.
    large = Tiles(
        *(128, 256, 64, 16),
        programs=arch.processors,
        slices=4,
        early=True,
        tma=True,
        num_warps=8,
        num_stages=3,
    )
    small = replace(large, block_n=128, programs=2 * arch.processors, early=False, num_warps=4)
    if arch.name == "cuda100":
        eight = replace(small, programs=arch.processors, num_warps=8, num_stages=4)
        return (eight, replace(eight, num_warps=4), small)
    middle = replace(large, block_n=128, num_stages=4)
    if any(size % 256 for size in spec.sizes) and not any(size % 128 for size in spec.sizes):
        return (middle, small)  # y leaves by TMA where no tile is cut off
    if rows <= FEW:
        return (middle, small, large)
    return (
        large,
        replace(large, num_stages=4),
        replace(large, early=False, num_stages=4),
        middle,
        small,
    )


def persistent_tiles(spec: DeltaSpec, rows: int, arch: Architecture) -> dict[str, Tiles]:
    """Tiles of the shrink and the product."""
    first = shrink_tiles(spec, rows, arch)
    second = persistent_variants(spec, rows, arch)[0]
    if not second.tma:  # element-wise loads have no registers for more than one plane
        first = replace(first, parts=1)
    second = replace(second, parts=first.parts)
    both = {"shrink": first, "persistent": second}
    return {name: replace(tiles, overlap=arch.overlaps) for name, tiles in both.items()}
