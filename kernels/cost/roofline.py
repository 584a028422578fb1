"""The cost models: the byte floor of any device, and a roofline of the strategies on a GPU.

    floor(D) = 1 + D · r · Σ_i (K_i + N_i) / Σ_i (K_i · N_i)

A decode step reads W once, and A and B of each distinct adapter in the batch once; siblings that
share x still have an A each. On a GPU a kernel takes

    t = max(device-memory bytes / bandwidth, L2 bytes / L2 bandwidth, FLOPs / rate)

and each kernel after the first one more dependent launch. What the strategies launch is in
docs/kernels.md; "concat" takes (K + C) / K of the FLOPs with C more columns, and copies W at every
call. docs/kernels.md has the model beside what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lorafx.kernels.cost.chips import DEFAULT_CHIP, Chip


class Sized(Protocol):
    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...


def byte_floor(sites: Iterable[Sized], rank: int, distinct: int) -> float:
    """Least traffic of these sites with `distinct` adapters of `rank`, relative to the base's."""
    parts = list(sites)
    weights = sum(part.in_features * part.out_features for part in parts)
    return 1 + distinct * factor_elements(parts, rank) / weights if weights else 1.0


def factor_elements(sites: Iterable[Sized], rank: int) -> int:
    """Elements of A and B of one adapter of `rank`: r · Σ_i (K_i + N_i)."""
    return rank * sum(site.in_features + site.out_features for site in sites)


def split_is_faster(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether one GEMM per sibling beats one GEMM over the packed weight.

    Measured (Zen 4, 2 cores, MKL for float32, oneDNN for bfloat16, K 1024, q/k/v of 1024 and
    gate/up of 2816, weights out of cache), packed over split:

        M                 1     2     4     8     16    64    128   1024
        float32  q/k/v    1.00  1.19  1.15  1.15  1.06  1.03  1.00  1.05
        float32  gate/up  0.98  1.11  1.14  1.17  1.08  1.09  1.13  1.07
        bfloat16 q/k/v    0.86  0.86  0.84  0.86  0.91  0.95  0.97  1.00
        bfloat16 gate/up  0.96  0.95  0.96  0.97  0.96  0.97  0.99  1.00
    """
    return device.type == "cpu" and dtype in (torch.float32, torch.float64)


# --- a node on a GPU ---

TILE_N, TILE_M, DOT = 128, 64, 16  # columns and rows of a tile of y; least side of a dot

#: Least seconds of a kernel that reads results of the kernel before it, whose loads depend on each
#: other; and of each further adapter in a tile that processes them one by one. Measured on an H200
#: with the layers of Llama-3-8B, 1 and 64 rows.
READER, ADAPTER = 2.5e-6, 1.2e-6
#: Seconds of a product before its first bytes arrive and after the last.
START = 4e-6
#: Speed of the loop over W in "epilogue" relative to the vendor's if bytes decide (H200): it has
#: too few programs for narrow layers and takes too many registers.
LOOP_OVER_VENDOR = 0.62
#: The same for "split", whose K is in parts.
SPLIT_OVER_VENDOR = 0.97


@dataclass(frozen=True)
class Estimate:
    """The modelled time of a strategy, which is not chosen if it has a `refusal`."""

    seconds: float
    over_base: float
    over_floor: float
    refusal: str = ""

    def __str__(self) -> str:
        text = f"{self.seconds * 1e6:.1f} µs, {self.over_base:.3f} of the base"
        return f"{text}, refused: {self.refusal}" if self.refusal else text


@dataclass(frozen=True)
class Work:
    """y (M, ΣN) = x (M, K) Wᵀ of siblings that share x, with deltas of D = `distinct` adapters."""

    in_features: int
    sizes: tuple[int, ...]
    rows: int
    distinct: int
    rank: int
    dtype: torch.dtype
    chip: Chip = DEFAULT_CHIP

    @property
    def columns(self) -> int:
        return sum(self.sizes)

    @property
    def padded_rank(self) -> int:
        return max(self.rank, DOT)

    @property
    def m_tiles(self) -> int:
        return math.ceil(self.rows / TILE_M)

    @property
    def n_tiles(self) -> int:
        return sum(math.ceil(size / TILE_N) for size in self.sizes)

    @property
    def adapters_in_tile(self) -> int:
        """The number of adapters in a tile of TILE_M rows, which are grouped by adapter."""
        return math.ceil(self.distinct / self.m_tiles)

    @property
    def weight_elements(self) -> float:
        return self.in_features * self.columns

    @property
    def a(self) -> float:
        return self.distinct * self.rank * len(self.sizes) * self.in_features

    @property
    def b(self) -> float:
        return self.distinct * self.rank * self.columns

    @property
    def product(self) -> float:
        return 2.0 * self.rows * self.in_features * self.columns

    @property
    def compute_bound(self) -> bool:
        """Whether FLOPs rather than bytes decide the base product's time."""
        memory = self.weight_elements * self.dtype.itemsize / self.chip.bandwidth
        return self.product / self.chip.rate(self.dtype) > memory

    def kernel(self, memory: float, l2: float, flops: float, *, tensor: bool = True) -> float:
        """Seconds of a kernel that moves these elements and does these FLOPs."""
        size, chip = self.dtype.itemsize, self.chip
        rate = chip.rate(self.dtype) if tensor else chip.fma_rate
        return max(memory * size / chip.bandwidth, l2 * size / chip.l2_bandwidth, flops / rate)

    def reader(self, memory: float, l2: float, flops: float, *, tensor: bool = True) -> float:
        """Seconds of a kernel that waits for the kernel before it, with its launch."""
        return max(self.kernel(memory, l2, flops, tensor=tensor), READER) + self.chip.launch

    @property
    def cached(self) -> float:
        """Elements from the cache; 0 if FLOPs decide, whose measured rate includes the cache."""
        M, K, N = self.rows, self.in_features, self.columns
        return 0 if self.compute_bound else self.m_tiles * K * N + self.n_tiles * M * K + M * N

    def base(self, memory: float = 0.0, l2: float = 0.0, flops: float = 0.0) -> float:
        moved = self.weight_elements + self.rows * (self.in_features + self.columns) + memory
        return self.kernel(moved, self.cached + l2, self.product + flops)

    def fused_base(
        self, memory: float, l2: float, flops: float, streaming: float = LOOP_OVER_VENDOR
    ) -> float:
        """Seconds of the base product in a generated kernel, at its measured speed."""
        speed = (self.chip.triton_over_vendor or 1.0) if self.compute_bound else streaming
        return self.base(memory, l2, flops) / speed + START

    def vendor(self) -> float:
        return self.base() + START

    def floor(self) -> float:
        """Seconds of an ideal implementation, which reads W and each active factor once."""
        flops = 2.0 * self.rows * self.rank * (len(self.sizes) * self.in_features + self.columns)
        return self.base(self.a + self.b, 0, flops) + START


def work_of(
    sites: Sequence[Sized], rows: int, slots: int, rank: int, dtype: torch.dtype, chip: Chip
) -> Work:
    """The work of a node for sites that share x, in a batch of min(slots, rows) adapters."""
    sizes = tuple(site.out_features for site in sites)
    distinct = max(1, min(slots, rows))
    return Work(sites[0].in_features, sizes, max(rows, 1), distinct, rank, dtype, chip)


# --- strategies that compute the base product themselves ---


def _epilogue(work: Work) -> float:
    adapters, G = work.adapters_in_tile, len(work.sizes)
    padded = work.padded_rank * adapters
    M, K, N = work.rows, work.in_features, work.columns
    v = M * G * work.rank
    shrink = work.kernel(work.a + M * K + v, 0, 2.0 * M * padded * G * K)
    l2 = work.m_tiles * adapters * work.rank * N
    return shrink + work.chip.launch + work.fused_base(work.b + v, l2, 2.0 * M * padded * N)


#: Of the second kernel of "split": rows of a tile; rows that are sorted by slot before they are
#: distributed to tiles; loads that depend on each other; factors that are multiplied side by side,
#: half as many for layers of WIDE columns or more.
TILE, WINDOW, LOADS, LANES, WIDE = 16, 64, 2, 64, 16384
#: Seconds of one dependent load; the READER timed on an H200 had four.
DEPENDENT_LOAD = READER / 4


def _split(work: Work) -> float:
    """The second kernel takes further rounds for adapters that a tile cannot multiply at once."""
    M, K, N, G = work.rows, work.in_features, work.columns, len(work.sizes)
    sums, flops = _plane_elements(work), 2.0 * M * work.padded_rank * work.adapters_in_tile
    first = work.fused_base(work.a, sums, flops * G * K, SPLIT_OVER_VENDOR)
    second = work.kernel(work.b + sums + M * N, 0, flops * N)
    wait = LOADS * DEPENDENT_LOAD + (split_rounds(work) - 1) * ADAPTER
    return first + max(second, wait) + work.chip.launch


def _plane_elements(work: Work) -> float:
    """Elements of the float32 planes of the parts of K (kernels/triton/tiles.py), or of y for 1."""
    wide = 128 if work.columns >= WIDE or work.rows <= TILE else 64
    tiles = work.m_tiles * math.ceil(work.columns / wide)
    most = min(work.chip.processors * 3 // 2 // tiles, math.ceil(work.in_features / 64) // 4)
    parts = 1 << max(min(most, 8), 1).bit_length() - 1
    planes = parts * 4 / work.dtype.itemsize if parts > 1 else 1
    return work.rows * work.columns * planes


def split_rounds(work: Work) -> int:
    """The number of rounds in which a tile of the second kernel takes its adapters."""
    tiles = math.ceil(min(work.rows, WINDOW) / TILE)
    adapters = math.ceil(work.adapters_in_tile / tiles)
    lanes = LANES // 2 if work.columns >= WIDE and work.rows > TILE else LANES
    return math.ceil(adapters / max(lanes // work.rank, 1))


# --- strategies around the vendor's GEMM ---

#: Shrink and expand took 2.1 (gate/up), 3.0 (down) and 3.7 (q/k/v) times their roofline on an H200
#: with 8192 rows (2026-11-20).
OVER_ROOFLINE = 3.0
#: The most columns that "concat" appends, which is as far as it was measured (H200, 2026-11-27);
#: their unit, and the unit of K in the vendor's GEMM.
MAX_COLUMNS, UNIT, K_TILE = 384, 16, 64


def _gemv(work: Work) -> float:
    M, K, N, G = work.rows, work.in_features, work.columns, len(work.sizes)
    A, B = work.rank * G * K, work.rank * N
    shrink = work.reader(work.a + M * K, M * A, 2.0 * M * A, tensor=False)
    expand = work.reader(work.b + 2 * M * N, M * B, 2.0 * M * B, tensor=False)
    return work.vendor() + shrink + expand


def _segments(work: Work) -> float:
    y = 2 * work.rows * work.columns
    expand = _by_runs(work, work.b + y, work.columns)
    return work.vendor() + _shrink(work) + expand + 2 * (work.adapters_in_tile - 1) * ADAPTER


def _shrink(work: Work) -> float:
    x = work.rows * work.in_features
    return _by_runs(work, work.a + x, len(work.sizes) * work.in_features)


def _by_runs(work: Work, memory: float, terms: int) -> float:
    """A shrink or an expand over runs of equal slots, padded to whole dots."""
    run = math.ceil(math.ceil(work.rows / max(work.distinct, 1)) / DOT) * DOT
    flops = 2.0 * work.distinct * run * work.padded_rank * terms
    slow = OVER_ROOFLINE if work.compute_bound else 1.0
    return max(work.kernel(memory, 0, flops) * slow, READER) + work.chip.launch


def _concat(work: Work) -> float:
    M, K, N = work.rows, work.in_features, work.columns
    extra = _extra_columns(work)
    flops = 2.0 * M * N * math.ceil((K + extra) / K_TILE) * K_TILE
    product = work.kernel(K * N + M * (K + N), work.cached, flops) + START
    beside_w = work.reader(work.b + extra * N, 0, 0)
    copy = work.kernel(2 * K * N + extra * N, 0, 0) + work.chip.launch
    zeros = work.kernel(M * extra, 0, 0) + work.chip.launch
    return _shrink(work) + beside_w + copy + zeros + product


def _extra_columns(work: Work) -> int:
    return len(work.sizes) * work.distinct * math.ceil(work.rank / UNIT) * UNIT


# --- the choice ---

GPU_STRATEGIES = {
    "split": _split,
    "epilogue": _epilogue,
    "gemv": _gemv,
    "segments": _segments,
    "concat": _concat,
}
#: Strategies that compute the base product themselves.
FUSED = ("split", "epilogue")
#: The least speed of plain Triton relative to the vendor's GEMM for which a fused kernel is used if
#: FLOPs decide: a slower product costs more than all of LoRA (5 % against 0.6 to 5 % of the floor).
LEAST_TRITON_OVER_VENDOR = 0.97


def estimate(work: Work) -> dict[str, Estimate]:
    """The modelled times of all strategies for `work`, fastest first, refused ones last."""
    seconds = {name: model(work) for name, model in GPU_STRATEGIES.items()}
    refusals = {name: _refusal(name, work) for name in seconds}
    base, floor = work.vendor(), work.floor()
    return {
        name: Estimate(seconds[name], seconds[name] / base, seconds[name] / floor, refusals[name])
        for name in sorted(seconds, key=lambda name: (bool(refusals[name]), seconds[name]))
    }


def _refusal(name: str, work: Work) -> str:
    if name == "split" and any(size % 16 for size in (work.in_features, *work.sizes)):
        # On a GPU these kernels were run for whole blocks of 16 elements only.
        return "K or a column count is not a multiple of 16"
    if name == "concat":
        if not work.compute_bound:
            return "bytes decide, and fused kernels read W once as well"
        if (extra := _extra_columns(work)) > MAX_COLUMNS:
            return f"{extra} more columns of x and W are more than {MAX_COLUMNS}"
        return "x A may overflow float16" if work.dtype == torch.float16 else ""
    return slower_than_vendor(work.chip) if name in FUSED and work.compute_bound else ""


def slower_than_vendor(chip: Chip) -> str:
    """Why a generated base product is too slow if FLOPs decide; "" if it is not."""
    speed = chip.triton_over_vendor
    if speed is None:
        return "plain Triton was not measured against the vendor GEMM for this many rows"
    if speed < LEAST_TRITON_OVER_VENDOR:
        return f"plain Triton reaches {speed:.2f} of the vendor GEMM"
    return ""
