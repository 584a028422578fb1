"""The GPU cost model with tiles: what kernels/cost/roofline.py leaves out as a tile decides it.

    t = max(device-memory bytes / (bandwidth · busy), L2 bytes / L2 bandwidth, FLOPs · idle / rate)

    busy = min(1, bytes in flight / (bandwidth · latency))   too few loads do not fill the memory
    idle = programs of full waves / programs                 the last wave leaves processors empty

and x and W are read again, from the second-level cache, by each row and column of tiles. Good for
leaving out what is far off, not for choosing a winner: that is tune.py's clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Flag, auto

from lorafx.kernels.cost.chips import Chip
from lorafx.kernels.cost.roofline import Work
from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.kernels.triton.tiles import Architecture, Tiles

TileSet = Mapping[str, Tiles]

LATENCY = 0.8e-6  # seconds from asking device memory to having: assumed
ACCUMULATORS = 128  # registers a thread that a tile's sums may take of 255


class Does(Flag):
    """What a kernel does, as far as its cost depends on it. One that does none of this adds
    deltas, of v, to what others computed."""

    SHRINK = auto()  # computes v = x A
    BASE = auto()  # loops over W
    BY_ROW = auto()  # takes one row a program, without matrix instructions


DOES: Mapping[str, Does] = {
    "shrink": Does.SHRINK,
    "shrink_rows": Does.SHRINK | Does.BY_ROW,
    "expand_rows": Does.BY_ROW,
    "embedding_rows": Does.BY_ROW,
    "split": Does.BASE,
    "epilogue": Does.BASE,
    **dict.fromkeys(("expand", "reduce", "gather", "place"), Does(0)),
}


def shared_bytes(tiles: Tiles, spec: DeltaSpec) -> int:
    """Shared memory that the pipeline of a kernel's loop takes, about."""
    return (
        tiles.num_stages
        * tiles.block_k
        * (tiles.block_m + tiles.block_n)
        * max(spec.x_dtype.itemsize, 1)
    )


def fits(name: str, tiles: Tiles, spec: DeltaSpec, arch: Architecture) -> bool:
    """Whether a kernel can run so: shared memory, sums in registers."""
    does = DOES[name]
    if Does.BASE in does and shared_bytes(tiles, spec) > arch.shared_kib * 1024:
        return False
    wide = tiles.block_r if Does.SHRINK in does else tiles.block_n
    if Does.BY_ROW not in does:
        return tiles.block_m * wide <= ACCUMULATORS * arch.warp * tiles.num_warps
    return tiles.block_n * tiles.block_r <= ACCUMULATORS * arch.warp * tiles.num_warps


def predicted(
    strategy: str,
    tiles: TileSet,
    spec: DeltaSpec,
    rows: int,
    arch: Architecture,
    chip: Chip,
) -> float:
    """Modelled seconds of the strategy's kernels, launched one after another."""
    work = Work(
        max(spec.in_features, 1),
        spec.sizes,
        rows,
        min(rows, 8),
        spec.max_rank,
        spec.y_dtype if spec.embedding else spec.x_dtype,
        chip,
    )
    seconds = chip.launch * (len(tiles) - 1)
    return seconds + sum(_kernel(name, tile, work, arch) for name, tile in tiles.items())


def _kernel(name: str, tiles: Tiles, work: Work, arch: Architecture) -> float:
    """Modelled seconds of one kernel, cut up by `tiles`."""
    M, K, N, G = work.rows, work.in_features, work.columns, len(work.sizes)
    A, B = work.distinct * work.rank * G * K, work.distinct * work.rank * N
    does = DOES[name]
    by_row, base = Does.BY_ROW in does, Does.BASE in does
    tall = M if by_row else math.ceil(M / tiles.block_m)
    wide: int
    memory: float
    l2: float
    planes = 2.0 * G * work.rank * M * tiles.parts  # of v, float32 beside elements of half of that
    if Does.SHRINK in does:
        wide = math.ceil(G * work.rank / tiles.block_r)
        programs = tall * wide * tiles.parts
        memory, l2 = A + M * K + planes, wide * M * K
        flops = 2.0 * tall * (1 if by_row else tiles.block_m) * G * work.rank * K
        in_flight = tiles.block_k * (tiles.block_r + (1 if by_row else tiles.block_m))
    else:
        wide = sum(math.ceil(size / tiles.block_n) for size in work.sizes)
        programs = tall * wide * (tiles.split if name == "split" else 1)
        memory = B + M * N * (1 if base else 2) + planes
        l2 = tall * B + wide * planes
        flops = 2.0 * tall * (1 if by_row else tiles.block_m) * work.rank * N
        in_flight = tiles.block_n * (tiles.block_r if not base else tiles.block_k)
        if name in ("split", "reduce"):
            l2 += 2.0 * tiles.split * M * N  # of y, likewise
        if base:
            memory, l2 = memory + K * N + M * K, l2 + tall * K * N + wide * M * K
            flops += 2.0 * tall * tiles.block_m * K * N
    resident = arch.processors * _occupancy(name, tiles, work, arch)
    waves = math.ceil(programs / resident)
    flying = min(programs, resident) * tiles.num_stages * in_flight * work.dtype.itemsize
    busy = min(1.0, flying / (work.chip.bandwidth * LATENCY))
    idle = waves * resident / programs if flops / work.chip.rate(work.dtype) > LATENCY else 1.0
    return work.kernel(memory / busy, l2, flops * max(idle, 1.0))


def _occupancy(name: str, tiles: Tiles, work: Work, arch: Architecture) -> int:
    """Programs that one processor runs at a time."""
    threads = 2048 // (arch.warp * tiles.num_warps)
    if Does.BASE not in DOES[name]:
        return max(threads // 2, 1)
    stage = tiles.block_k * (tiles.block_m + tiles.block_n) * work.dtype.itemsize
    return max(min(threads, arch.shared_kib * 1024 // (stage * tiles.num_stages)), 1)
