"""One node as the GPU's cost models see it: its sizes, a roofline, what launches and readers take.

t = max(device-memory bytes / bandwidth, L2 bytes / L2 bandwidth, FLOPs / rate)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from lorafx.kernels.cost.chips import DEFAULT_CHIP, Chip

TILE_N, TILE_M, DOT = 128, 64, 16  # columns and rows of a tile of y; least side of a dot


@dataclass(frozen=True)
class Estimate:
    """Modelled time of one strategy for one node.

    Attributes:
        seconds: of base product and delta together.
        over_base: over the vendor GEMM alone.
        over_floor: over the vendor GEMM with A, B and the LoRA FLOPs added, and nothing else.
        refusal: why it is not chosen whatever its time; empty where it may be.
    """

    seconds: float
    over_base: float
    over_floor: float
    refusal: str = ""

    def __str__(self) -> str:
        text = f"{self.seconds * 1e6:.1f} µs, {self.over_base:.3f} of the base"
        return f"{text}, refused: {self.refusal}" if self.refusal else text


#: Seconds of a kernel that reads what the one before it wrote, however little: its loads follow
#: from each other. And of one adapter more in a tile that takes its adapters one after another.
#: Measured on an H200 with the layers of Llama-3-8B, 1 and 64 rows.
READER, ADAPTER = 2.5e-6, 1.2e-6
#: Seconds before a product's bytes flow and after they have: a product of few bytes takes longer.
START = 4e-6
#: Speed of our kernels' loop over W beside the vendor's where bytes decide (an H200): that of
#: "epilogue" and "recompute" has too few programs for narrow layers and too many registers.
LOOP_OVER_VENDOR = 0.62


@dataclass(frozen=True)
class Work:
    """One node: y (M, ΣN) = x (M, K) Wᵀ with the deltas of D adapters of rank r in M rows.

    Attributes:
        sizes: N_i of the siblings that share x.
        distinct: D, adapters in the batch.
    """

    in_features: int
    sizes: tuple[int, ...]
    rows: int
    distinct: int
    rank: int
    dtype: torch.dtype
    chip: Chip = field(default=DEFAULT_CHIP)

    @property
    def columns(self) -> int:
        return sum(self.sizes)

    @property
    def factors(self) -> int:
        """Elements of A and B of one adapter."""
        return self.rank * (len(self.sizes) * self.in_features + self.columns)

    @property
    def m_tiles(self) -> int:
        return math.ceil(self.rows / TILE_M)

    @property
    def n_tiles(self) -> int:
        return sum(math.ceil(size / TILE_N) for size in self.sizes)

    @property
    def compute_bound(self) -> bool:
        """Whether FLOPs rather than bytes decide the base product's time."""
        memory = self.in_features * self.columns * self.dtype.itemsize / self.chip.bandwidth
        return self.product / self.chip.rate(self.dtype) > memory

    @property
    def cached(self) -> int:
        """Elements that the base product's tiles take from the cache; 0 where FLOPs decide."""
        M, K, N = self.rows, self.in_features, self.columns
        return 0 if self.compute_bound else self.m_tiles * K * N + self.n_tiles * M * K + M * N

    @property
    def product(self) -> float:
        """FLOPs of the base product."""
        return 2.0 * self.rows * self.in_features * self.columns

    def kernel(self, memory: float, l2: float, flops: float, *, tensor: bool = True) -> float:
        """Seconds of a kernel that moves these elements and does these FLOPs."""
        size = self.dtype.itemsize
        rate = self.chip.rate(self.dtype) if tensor else self.chip.fma_rate
        return max(
            memory * size / self.chip.bandwidth, l2 * size / self.chip.l2_bandwidth, flops / rate
        )

    def base(self, memory: float = 0.0, l2: float = 0.0, flops: float = 0.0) -> float:
        """Seconds of the base product by kernels that also do what is named.

        Where FLOPs decide, the rate is one that was reached with all that the cache had to give:
        the vendor's tiles are larger, and neighbours share what they read.
        """
        M, K, N = self.rows, self.in_features, self.columns
        return self.kernel(K * N + M * (K + N) + memory, self.cached + l2, self.product + flops)

    def vendor(self) -> float:
        """Seconds of the vendor's GEMM."""
        return self.base() + START

    def floor(self) -> float:
        """Seconds that no implementation goes below: each active factor read once and used."""
        M, K, N = self.rows, self.in_features, self.columns
        flops = 2.0 * M * self.rank * (len(self.sizes) * K + N)
        return self.base(self.distinct * self.factors, 0, flops)


def adapters_in_tile(work: Work) -> int:
    """Adapters that a tile of TILE_M rows, grouped by adapter, has to look at."""
    return math.ceil(work.distinct / work.m_tiles)


def padded_rows(work: Work) -> int:
    """Rows of runs of equal slots, each padded to what a dot takes."""
    a_run = math.ceil(work.rows / max(work.distinct, 1))
    return work.distinct * math.ceil(a_run / DOT) * DOT


def reader(work: Work, memory: float, l2: float, flops: float, *, tensor: bool = True) -> float:
    """A kernel that has to wait for the one before it, and its launch."""
    own = work.kernel(memory, l2, flops, tensor=tensor)
    return max(own, READER) + work.chip.launch


def fused_base(
    work: Work, memory: float, l2: float, flops: float, streaming: float = LOOP_OVER_VENDOR
) -> float:
    """The base product by our own kernel, slower than the vendor's by what was measured."""
    speed = (work.chip.triton_over_vendor or 1.0) if work.compute_bound else streaming
    return work.base(memory, l2, flops) / speed + START
