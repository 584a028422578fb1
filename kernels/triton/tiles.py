"""Tile sizes of the generated Triton kernels: data, with the reasons, by kernel and architecture.

    bytes in flight = stages · BLOCK_K · (BLOCK_M + BLOCK_N) · bytes an element  ≤  shared memory
    programs        = row tiles · column tiles · parts                           ≈  processors

Decode reads W once whatever the tile is, so it wants many programs with deep pipelines; prefill
wants square tiles. These are a heuristic's figures, checked by ahead-of-time compilation (spills,
shared memory), not by a clock; what a tuner measured goes before them (build.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from lorafx.kernels.ops.delta_spec import DeltaSpec


@dataclass(frozen=True)
class Tiles:
    """How one kernel cuts up its work.

    Attributes:
        block_m, block_n, block_k: rows, columns and terms of a tile.
        block_r: factors of a tile, the rank padded for the matrix instruction.
        parts, split: planes of partial sums of the shrink, and of the base product (one is y).
        lanes: programs of the shrink that share the distinct slots of a row tile.
        group_m: row tiles that walk through W together.
        swap: the tile is held transposed, so that few rows take the narrow side (N ≥ 8) of a
            matrix instruction and columns the wide one (M ≥ 16; 64 for wgmma).
        window: rows that are sorted by slot in the kernel itself, before it takes block_m of them.
        picked: rows of one slot that the shrink computes at a time; 0: the tile for each slot.
        batched: the reader of v multiplies a tile's slots side by side, block_r factors at a time.
        at_once: slots whose ranks a batched reader fetches beside the slots of its rows, so that B
            waits for one load instead of three; 0: for its rows' slots, once it has those.
        overlap: the reader of v starts while the shrink runs (programmatic dependent launch).
        ordered: rows are visited sorted by slot, so that a tile holds few adapters.
    """

    block_m: int = 16
    block_n: int = 64
    block_k: int = 64
    block_r: int = 16
    parts: int = 1
    split: int = 1
    lanes: int = 1
    group_m: int = 8
    swap: bool = False
    ordered: bool = False
    window: int = 0
    picked: int = 0
    batched: bool = False
    at_once: int = 0
    overlap: bool = False
    num_warps: int = 4
    num_stages: int = 3

    @property
    def blocks(self) -> dict[str, int]:
        return {f"BLOCK_{side}": getattr(self, f"block_{side.lower()}") for side in "MNKR"}


@dataclass(frozen=True)
class Architecture:
    """A device as the heuristic sees it; `overlaps`: it has programmatic dependent launch."""

    name: str
    processors: int
    shared_kib: int
    warp: int = 32
    overlaps: bool = False


# 99 KiB is what the consumer parts of a generation allow where the data-centre part allows more.
ARCHITECTURES: Mapping[str, Architecture] = {
    arch.name: arch
    for arch in (
        Architecture("cuda80", processors=108, shared_kib=99),
        Architecture("cuda90", processors=132, shared_kib=200, overlaps=True),
        Architecture("cuda100", processors=148, shared_kib=200, overlaps=True),
        Architecture("gfx942", processors=304, shared_kib=64, warp=64),
        # Few, large programs: each operation of Triton's interpreter costs tens of microseconds.
        Architecture("interpreter", processors=4, shared_kib=1 << 20),
    )
}


def architecture_of(device: torch.device) -> Architecture:
    """The row nearest to `device`, the interpreter for a CPU; without a driver cuda80."""
    if device.type == "cpu":
        return ARCHITECTURES["interpreter"]
    if torch.version.hip is not None:
        return ARCHITECTURES["gfx942"]
    if not torch.cuda.is_available():
        return ARCHITECTURES["cuda80"]
    major, _ = torch.cuda.get_device_capability(device)
    found = ARCHITECTURES["cuda100" if major >= 10 else "cuda90" if major == 9 else "cuda80"]
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", found.shared_kib * 1024)
    return replace(
        found,
        processors=properties.multi_processor_count,
        shared_kib=min(found.shared_kib, shared // 1024),
    )


def power_of_two(value: int, least: int, most: int) -> int:
    return min(max(1 << max(value - 1, 0).bit_length(), least), most)


def stages_that_fit(arch: Architecture, bytes_a_stage: int, most: int) -> int:
    """As many pipeline stages as shared memory has room for; AMD's pipeline wants two."""
    if arch.warp == 64:
        return 2
    room = arch.shared_kib * 1024 - 4096  # Triton's own scratch for reductions and layouts
    return max(min(room // bytes_a_stage, most), 1)


def aligned(spec: DeltaSpec) -> bool:
    """Whether rows of x, W and y start at multiples of 16 elements. Else they are loaded an element
    at a time, by pointers that fill registers: 64 columns and more spill (K 2049)."""
    return all(size % 16 == 0 for size in (spec.in_features, *spec.sizes, spec.columns))


def linear_tiles(spec: DeltaSpec, rows: int, arch: Architecture, kernel: str) -> Tiles:
    """Tiles of "epilogue" and "expand". Sixteen factors at a time: v takes registers
    for each part, and twice in the bank's type; with more, kernels of rank 64 and 256 spill."""
    width = max(spec.sizes)
    if arch.name == "interpreter":
        return Tiles(
            block_m=power_of_two(rows, 16, 64),
            block_n=power_of_two(width, 16, 128),
            block_k=power_of_two(spec.in_features, 16, 256),
            block_r=power_of_two(spec.max_rank, 16, 64),
            group_m=2,
            batched=kernel == "epilogue",
        )
    if kernel == "expand":  # y is written, or read too: nothing to pipeline
        plain = aligned(spec) and spec.bank_dtype.itemsize == 2 and spec.max_rank <= 32
        return Tiles(power_of_two(rows, 16, 32), block_n=128 if plain else 64, num_stages=2)
    size = spec.x_dtype.itemsize
    if size == 4:  # no matrix instructions: products in registers, so small tiles
        block_m = power_of_two(rows, 16, 64 if aligned(spec) else 32)
        tiles = Tiles(block_m=block_m, block_n=32, block_k=32)
    elif not aligned(spec):
        tiles = Tiles(power_of_two(rows, 16, 64), block_n=32, block_k=32, num_stages=2)
    elif rows <= 64:
        # Half as wide where tiles of 64 columns would leave half of the processors idle.
        wide = sum(-(-n // 64) for n in spec.sizes) >= arch.processors // 2
        block_m = power_of_two(rows, 16, 64)
        block_k = 128 if block_m <= 32 else 64
        # Four warps spill 40 to 72 bytes there with large ranks.
        crowded = arch.name == "cuda80" and block_m == 64 and spec.max_rank > 32
        warps = 8 if crowded else 4
        tiles = Tiles(
            block_m, 64 if wide else 32, block_k, swap=True, num_warps=warps, num_stages=5
        )
    elif rows <= 256:
        tiles = Tiles(block_m=64, block_n=64, block_k=64, num_stages=4)
    else:
        block_k = 32 if arch.warp == 64 else 64
        # A bank of float32 takes the registers that the wider tile would need.
        block_n = 128 if spec.bank_dtype.itemsize == 2 else 64
        tiles = Tiles(128, block_n, block_k, num_warps=8, num_stages=4)
    stage = tiles.block_k * (tiles.block_m + tiles.block_n) * size
    return replace(tiles, num_stages=stages_that_fit(arch, stage, tiles.num_stages))


def shrink_tiles(spec: DeltaSpec, rows: int, arch: Architecture) -> Tiles:
    """Tiles of the shrink: enough parts of K that all processors read A and x at once."""
    factors = len(spec.sizes) * spec.max_rank
    block_m = power_of_two(rows, 16, 64)
    if arch.name == "interpreter":
        block_k = power_of_two(-(-spec.in_features // 2), 16, 1024)
        parts = 2 if spec.in_features > block_k else 1
        block_r = power_of_two(factors, 16, 64)
        picked = 16 if block_m > 16 else 0
        return Tiles(block_m=block_m, block_k=block_k, block_r=block_r, parts=parts, picked=picked)
    # Few rows: x is small, so more programs that each read it. Many: x is read once.
    block_r = 16 if rows <= 64 else power_of_two(factors, 16, 64)
    size = max(spec.x_dtype.itemsize, spec.bank_dtype.itemsize)
    picked = 16 if 16 < rows <= 64 else 0  # the rows of one adapter are few of a tile's
    wide = picked or block_m
    block_k = 128 if wide <= 32 else 64
    if size == 4 or spec.in_features % 16:
        block_k = 32
    programs = -(-rows // block_m) * -(-factors // block_r)
    # The reader fetches all planes for each of its tiles, into registers.
    blocks = -(-spec.in_features // block_k)
    parts = max(min(arch.processors // programs, blocks // 2, 8 if block_m <= 32 else 4), 1)
    # At 64 rows registers are short for element-wise loads of float32, and, but on Hopper, for many
    # factors (24 to 40 bytes spilled by ptxas for cuda80 and cuda100): twice the threads.
    crowded = block_r >= 32 and arch.name in ("cuda80", "cuda100")
    # Adapters fill what parts do not: with eight in a batch, eight programs read one A each.
    lanes = power_of_two(arch.processors // (programs * parts), 1, 8) if rows <= 64 else 1
    return Tiles(
        block_m=block_m,
        block_k=block_k,
        block_r=block_r,
        parts=parts,
        lanes=lanes,
        picked=picked,
        swap=wide < 64,
        num_warps=8 if wide == 64 and (crowded or (size == 4 and spec.in_features % 16)) else 4,
        num_stages=stages_that_fit(arch, block_k * (wide + block_r) * size, 4),
    )


def concat_tiles(spec: DeltaSpec, rows: int, arch: Architecture) -> dict[str, Tiles]:
    """Tiles of "gather" and "place", a shrink whose result is read as it is, so that K stays whole:
    row tiles are as low as fill the processors, and few rows take a program for 16 factors."""
    factors = len(spec.sizes) * power_of_two(spec.max_rank, 16, 1 << 20)
    if arch.name == "interpreter":
        wide = power_of_two(max(spec.sizes), 16, 128)
        first = Tiles(block_n=wide, block_r=power_of_two(spec.max_rank, 16, 64))
        second = Tiles(
            block_m=power_of_two(rows, 16, 64),
            block_n=wide,
            block_k=power_of_two(spec.in_features, 16, 256),
            block_r=power_of_two(factors, 16, 64),
            ordered=rows > 64,
        )
        return {"gather": replace(first, ordered=second.ordered), "place": second}
    ordered = rows > 64
    first = Tiles(block_n=64, block_r=power_of_two(spec.max_rank, 16, 64), ordered=ordered)
    block_m = power_of_two(rows // arch.processors, 16, 64)
    block_r = power_of_two(factors, 16, 16 if rows < 16 * arch.processors else 64)
    size = spec.x_dtype.itemsize
    block_k = 32 if size == 4 or spec.in_features % 16 else 128 if block_m <= 32 else 64
    second = Tiles(
        block_m=block_m,
        block_n=64,
        block_k=block_k,
        block_r=block_r,
        swap=block_m < 64,
        ordered=ordered,
        # Loads of x and A and stores of v hold a pointer an element: 80 bytes spilled with four.
        num_warps=8 if block_m * block_r >= 64 * 32 else 4,
        num_stages=stages_that_fit(arch, block_k * (block_m + block_r) * size, 4),
    )
    return {"gather": first, "place": second}


def shrink_rows_tiles(spec: DeltaSpec, rows: int, arch: Architecture) -> Tiles:
    """Tiles of the per-row shrink: a few factors by a long stretch of K, in registers."""
    factors = len(spec.sizes) * spec.max_rank
    if arch.name == "interpreter":
        block_k = power_of_two(-(-spec.in_features // 2), 16, 1024)
        parts = 2 if spec.in_features > block_k else 1
        return Tiles(block_k=block_k, block_r=power_of_two(factors, 1, 64), parts=parts)
    block_r = power_of_two(factors, 4, 8)
    block_k = power_of_two(spec.in_features, 64, 512)
    blocks = -(-spec.in_features // block_k)
    parts = max(min(arch.processors // (rows * -(-factors // block_r)), blocks // 2, 16), 1)
    return Tiles(block_k=block_k, block_r=block_r, parts=parts, num_stages=2)


def expand_rows_tiles(spec: DeltaSpec, arch: Architecture) -> Tiles:
    wide = 1024 if arch.name == "interpreter" else 256
    return Tiles(
        block_n=power_of_two(max(spec.sizes), 16, wide),
        block_r=power_of_two(spec.max_rank, 1, 16),
        num_stages=2,
    )


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
    pair = {"split": first, "reduce": second}
    return {name: replace(tiles, overlap=arch.overlaps) for name, tiles in pair.items()}
