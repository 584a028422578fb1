"""The cost model of products with routed experts on a GPU: a roofline, as kernels/cost/cost.py.

    experts with rows   H(E) = E (1 - (1 - 1/E)^M)      M rows that are spread evenly
    pairs with rows     H(E·D), of experts and adapters: each one's A and B is read once

    grouped     shrink, then one kernel of product and expand, a tile an expert's
    activated   the same, where the shrink also computes x: one kernel less
    segments    the vendor's grouped product, keys of rows, shrink and expand over sorted rows
    gemv        the same a row at a time

No figure here was measured on a chip but those that chips.py and cost.py say were:
how fast the kernels stream W, what the host's loop costs and what sorting costs are assumptions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lorafx.kernels.cost.chips import Chip
from lorafx.kernels.cost.cost import ranked, slower_than_vendor
from lorafx.kernels.cost.work import DOT, READER, START, TILE_M, Estimate

#: Speed of the grouped kernel's loop over W beside the vendor's grouped product where bytes decide:
#: assumed. Experts give it thousands of programs, which the slower dense kernels lack, and the
#: vendor's tiles are mostly empty there; `split` was measured to reach 0.97 of a dense product.
STREAMING = 1.0
#: Seconds of a product that the host launches in a loop over experts, for each expert with rows,
#: and of its wait for where they end: assumed.
HOST_PRODUCT, HOST_WAIT = 5e-6, 2e-5


@dataclass(frozen=True)
class ExpertWork:
    """One node: rows sorted by expert, times W[e], with the deltas of D adapters of rank r.

    Attributes:
        rows: M, one for each token and expert that it was routed to.
        distinct: D, adapters in the batch.
        on_host: the base's own product is a loop over experts on the host.
        activation: whether x could be computed by the shrink.
    """

    in_features: int
    sizes: tuple[int, ...]
    rows: int
    experts: int
    distinct: int
    rank: int
    dtype: torch.dtype
    chip: Chip
    on_host: bool = False
    activation: bool = False

    def _hit(self, cells: int) -> float:
        """How many of so many cells have rows, on average."""
        return cells * -math.expm1(self.rows * math.log1p(-1 / cells)) if cells > 1 else 1.0

    @property
    def active(self) -> float:
        return self._hit(self.experts)

    @property
    def pairs(self) -> float:
        return self._hit(self.experts * self.distinct)

    @property
    def columns(self) -> int:
        return sum(self.sizes)

    @property
    def a(self) -> float:
        """Elements of A that are read."""
        return self.pairs * self.rank * len(self.sizes) * self.in_features

    @property
    def b(self) -> float:
        return self.pairs * self.rank * self.columns

    @property
    def product(self) -> float:
        """FLOPs of the base product."""
        return 2.0 * self.rows * self.in_features * self.columns

    @property
    def compute_bound(self) -> bool:
        memory = self.active * self.in_features * self.columns * self.dtype.itemsize
        return self.product / self.chip.rate(self.dtype) > memory / self.chip.bandwidth

    def kernel(self, memory: float, l2: float, flops: float, *, tensor: bool = True) -> float:
        """Seconds of a kernel that moves these elements and does these FLOPs."""
        size, chip = self.dtype.itemsize, self.chip
        rate = chip.rate(self.dtype) if tensor else chip.fma_rate
        return max(memory * size / chip.bandwidth, l2 * size / chip.l2_bandwidth, flops / rate)

    def base(self, memory: float = 0.0, flops: float = 0.0) -> float:
        """Seconds of the product by one kernel that also does what is named."""
        M, K, N = self.rows, self.in_features, self.columns
        tiles = self.active * math.ceil(M / self.active / TILE_M)
        moved = self.active * K * N + M * (K + N) + memory
        return self.kernel(moved, tiles * K * N, self.product + flops)

    def vendor(self) -> float:
        """Seconds of the base's own product."""
        if self.on_host:
            return self.base() + HOST_WAIT + self.active * HOST_PRODUCT
        return self.base() + START

    @property
    def floor(self) -> float:
        """Seconds that no implementation goes below."""
        flops = 2.0 * self.rows * self.rank * (len(self.sizes) * self.in_features + self.columns)
        return self.base(self.a + self.b, flops) + START

    @property
    def pointwise(self) -> float:
        """Seconds of computing x from two halves by a kernel of its own."""
        size = 3.0 * self.rows * self.in_features
        return self.kernel(size, 0, 0) + self.chip.launch if self.activation else 0.0


def _reader(work: ExpertWork, memory: float, l2: float, flops: float, *, tensor: bool) -> float:
    return max(work.kernel(memory, l2, flops, tensor=tensor), READER) + work.chip.launch


def _fused(work: ExpertWork, x_elements: float) -> float:
    M, K, N, G = work.rows, work.in_features, work.columns, len(work.sizes)
    padded = max(work.rank, DOT)
    shrink = _reader(work, work.a + x_elements, 0, 2.0 * M * padded * G * K, tensor=True)
    speed = (work.chip.triton_over_vendor or 1.0) if work.compute_bound else STREAMING
    return shrink + work.base(work.b, 2.0 * M * padded * N) / speed + START


def _grouped(work: ExpertWork) -> float:
    return _fused(work, work.rows * work.in_features) + work.pointwise


def _activated(work: ExpertWork) -> float:
    return _fused(work, 3.0 * work.rows * work.in_features)


def _delta(work: ExpertWork, l2: float, padding: float, *, tensor: bool) -> float:
    """Keys of rows, shrink and expand beside the base's own product."""
    M, K, N, G = work.rows, work.in_features, work.columns, len(work.sizes)
    shrink = _reader(work, work.a + M * K, l2 * G * K, padding * G * K, tensor=tensor)
    expand = _reader(work, work.b + 2 * M * N, l2 * N, padding * N, tensor=tensor)
    return work.vendor() + work.pointwise + 2 * work.chip.launch + shrink + expand


def _segments(work: ExpertWork) -> float:
    padded = work.pairs * math.ceil(work.rows / work.pairs / DOT) * DOT * max(work.rank, DOT)
    sorting = 2.0 * work.rows**2 / work.chip.fma_rate  # each row is compared with each
    return _delta(work, 0, 2.0 * padded, tensor=True) + sorting


def _gemv(work: ExpertWork) -> float:
    each = work.rows * work.rank
    return _delta(work, each, 2.0 * each, tensor=False)


EXPERT_STRATEGIES = {
    "grouped": _grouped,
    "activated": _activated,
    "segments": _segments,
    "gemv": _gemv,
}


def _refusal(name: str, work: ExpertWork) -> str:
    if name not in ("grouped", "activated"):
        return ""
    if name == "activated" and not work.activation:
        return "kernels cannot compute its input"
    if not work.compute_bound or work.on_host:
        return ""
    return slower_than_vendor(work.chip)


def estimate_experts(work: ExpertWork) -> dict[str, Estimate]:
    """Every strategy's modelled time for `work`, fastest first, refused ones last."""
    seconds = {name: model(work) for name, model in EXPERT_STRATEGIES.items()}
    refusals = {name: _refusal(name, work) for name in seconds}
    return ranked(seconds, refusals, work.vendor() + work.pointwise, work.floor)
