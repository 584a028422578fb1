"""The strategies of a decode step with a base product of their own, as modelled.

    split    base product in parts of K, and shrink; a reader that adds the parts up and expands
    ahead    "split" whose first kernel starts, and fetches W, while the one before it still runs

The reader waits for loads that follow from each other, and goes round by round where its tile has
more adapters than it multiplies side by side. An H200 timed one of four loads in turn (slots, the
sorted rows' slots, ranks, B) and a round an adapter; today's has two loads in turn, and is modelled
to take as long for each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorafx.kernels.cost.work import (
    ADAPTER,
    DOT,
    READER,
    Work,
    adapters_in_tile,
    fused_base,
)

#: A product of our own, with its K in parts, over the vendor's where bytes decide: an H200.
SPLIT_OVER_VENDOR = 0.97
#: Rows of a reader's tile, and of those that are sorted by slot before they are dealt to tiles.
TILE, WINDOW = 16, 64


@dataclass(frozen=True)
class Reader:
    """How the kernel that adds the parts up finds what it needs.

    Attributes:
        loads: that follow from each other.
        lanes: factors that are multiplied side by side; half where tiles are of many columns, as
            those of layers of WIDE columns or more are.
    """

    loads: int
    lanes: int


MEASURED, TODAY, WIDE = Reader(4, 16), Reader(2, 64), 16384
#: Seconds of one load in turn.
IN_TURN = READER / MEASURED.loads


def split(work: Work, form: Reader = TODAY) -> float:
    """Seconds of both kernels."""
    M, N = work.rows, work.columns
    sums = sums_of(work)
    own = work.kernel(work.distinct * work.rank * N + sums + M * N, 0, 2.0 * M * _padded(work) * N)
    wait = form.loads * IN_TURN + (rounds(work, form) - 1) * ADAPTER
    return first_kernel(work) + max(own, wait) + work.chip.launch


def ahead(work: Work) -> float:
    """As "split", less the launch that the kernel before it hides."""
    return split(work) - work.chip.launch


def first_kernel(work: Work) -> float:
    """Seconds of base product and shrink."""
    G, K = len(work.sizes), work.in_features
    A = work.distinct * work.rank * G * K
    return fused_base(
        work, A, sums_of(work), 2.0 * work.rows * _padded(work) * G * K, SPLIT_OVER_VENDOR
    )


def sums_of(work: Work) -> float:
    """Elements of the parts' planes, which are of float32; a single part goes through y.

    As many parts as lorafx.kernels.triton.strategy_tiles cuts K into.
    """
    wide = 128 if work.columns >= WIDE or work.rows <= TILE else 64
    tiles = work.m_tiles * math.ceil(work.columns / wide)
    most = min(work.chip.processors * 3 // 2 // tiles, math.ceil(work.in_features / 64) // 4)
    parts = 1 << max(min(most, 8), 1).bit_length() - 1
    planes = parts * 4 / work.dtype.itemsize if parts > 1 else 1
    return work.rows * work.columns * planes


def rounds(work: Work, form: Reader) -> int:
    """Times that a tile of the reader goes for further adapters, the first included."""
    tiles = math.ceil(min(work.rows, WINDOW) / TILE)
    adapters = math.ceil(adapters_in_tile(work) / tiles)
    halved = form is TODAY and work.columns >= WIDE and work.rows > TILE
    lanes = form.lanes // 2 if halved else form.lanes
    return math.ceil(adapters / max(lanes // work.rank, 1))


def _padded(work: Work) -> int:
    return max(work.rank, DOT) * adapters_in_tile(work)
