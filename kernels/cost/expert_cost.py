"""Cost model of products with routed experts on a GPU: the roofline of kernels/cost/roofline.py.

    experts with rows   H(E) = E (1 - (1 - 1/E)^M)      M rows that are spread evenly
    pairs with rows     H(E·D), of experts and adapters: the A and B of a pair are read once

    grouped     shrink, then one kernel of product and expand, a tile an expert's
    segments    the vendor's grouped product, keys of rows, shrink and expand over sorted rows
    gemv        the same a row at a time

The constants of this file are assumptions; measured figures are those of chips.py and roofline.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorafx.kernels.cost.roofline import DOT, TILE_M, Estimate, Work, ranked, slower_than_vendor

#: Assumed speed of the grouped kernel's loop over W beside the vendor's grouped product where bytes
#: decide: experts give it thousands of programs, and the vendor's tiles are mostly empty there.
STREAMING = 1.0
#: Assumed seconds of a product launched by the host's loop over experts, for an expert with rows,
#: and of the host's wait for where their rows end.
HOST_PRODUCT, HOST_WAIT = 5e-6, 2e-5


@dataclass(frozen=True)
class ExpertWork(Work):
    """Rows sorted by expert, times W[e], with the deltas of D adapters. `rows` are pairs of a token
    and an expert; `on_host`: the base's product is a loop over experts on the host."""

    experts: int = 1
    on_host: bool = False

    def _hit(self, cells: int) -> float:
        return cells * -math.expm1(self.rows * math.log1p(-1 / cells)) if cells > 1 else 1.0

    @property
    def active(self) -> float:
        return self._hit(self.experts)

    @property
    def pairs(self) -> float:
        return self._hit(self.experts * self.distinct)

    @property
    def weight_elements(self) -> float:
        return self.active * self.in_features * self.columns

    @property
    def a(self) -> float:
        return self.pairs * self.rank * len(self.sizes) * self.in_features

    @property
    def b(self) -> float:
        return self.pairs * self.rank * self.columns

    @property
    def cached(self) -> float:
        tiles = self.active * math.ceil(self.rows / self.active / TILE_M)
        return tiles * self.in_features * self.columns

    def vendor(self) -> float:
        if self.on_host:
            return self.base() + HOST_WAIT + self.active * HOST_PRODUCT
        return super().vendor()


def _grouped(work: ExpertWork) -> float:
    flops = 2.0 * work.rows * work.padded_rank
    x = work.rows * work.in_features
    shrink = work.reader(work.a + x, 0, flops * len(work.sizes) * work.in_features)
    return shrink + work.fused_base(work.b, 0, flops * work.columns, STREAMING)


def _delta(work: ExpertWork, l2: float, padding: float, *, tensor: bool) -> float:
    M, K, N, G = work.rows, work.in_features, work.columns, len(work.sizes)
    shrink = work.reader(work.a + M * K, l2 * G * K, padding * G * K, tensor=tensor)
    expand = work.reader(work.b + 2 * M * N, l2 * N, padding * N, tensor=tensor)
    return work.vendor() + 2 * work.chip.launch + shrink + expand


def _segments(work: ExpertWork) -> float:
    padded = work.pairs * math.ceil(work.rows / work.pairs / DOT) * DOT * work.padded_rank
    sorting = 2.0 * work.rows**2 / work.chip.fma_rate  # each row is compared with each
    return _delta(work, 0, 2.0 * padded, tensor=True) + sorting


def _gemv(work: ExpertWork) -> float:
    factors = work.rows * work.rank
    return _delta(work, factors, 2.0 * factors, tensor=False)


EXPERT_STRATEGIES = {
    "grouped": _grouped,
    "segments": _segments,
    "gemv": _gemv,
}


def _refusal(name: str, work: ExpertWork) -> str:
    if name != "grouped" or not work.compute_bound or work.on_host:
        return ""
    return slower_than_vendor(work.chip)


def estimate_experts(work: ExpertWork) -> dict[str, Estimate]:
    seconds = {name: model(work) for name, model in EXPERT_STRATEGIES.items()}
    refusals = {name: _refusal(name, work) for name in seconds}
    return ranked(seconds, refusals, work.vendor(), work.floor())
