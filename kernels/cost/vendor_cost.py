"""Strategies that leave the base product to the vendor's GEMM and prepare for it, as modelled.

    expand_first    shrink, expand to y0 = v B + b, then the vendor's GEMM with beta = 1

No time of these strategies was measured on a chip; what they are made of was, on an H200.
"""

from __future__ import annotations

from lorafx.kernels.cost.work import DOT, READER, START, Work, padded_rows

#: A vendor's GEMM that adds to a matrix takes this much of one that does not: an H200, 8192 rows.
BETA_ONE = 1.10
#: Shrink and expand took 2.1 (gate/up), 3.0 (down) and 3.7 times (q/k/v) their roofline on an H200
#: at 8192 rows.
OVER_ROOFLINE = 3.0


def delta_kernel(work: Work, memory: float, flops: float) -> float:
    """A shrink or an expand over many rows: what was measured of these, where FLOPs decide."""
    slow = OVER_ROOFLINE if work.compute_bound else 1.0
    return max(work.kernel(memory, 0, flops) * slow, READER) + work.chip.launch


def shrink(work: Work) -> float:
    """v of rows grouped by adapter: x and each A are read once."""
    A = work.rank * len(work.sizes) * work.in_features
    padded = padded_rows(work) * max(work.rank, DOT) / work.rank
    x = work.rows * work.in_features
    return delta_kernel(work, work.distinct * A + x, 2.0 * padded * A)


def expand(work: Work, passes: int) -> float:
    """v B over rows grouped by adapter, y being read and written in `passes`."""
    B = work.rank * work.columns
    padded = padded_rows(work) * max(work.rank, DOT) / work.rank
    y = passes * work.rows * work.columns
    return delta_kernel(work, work.distinct * B + y, 2.0 * padded * B)


def expand_first(work: Work) -> float:
    return shrink(work) + expand(work, 1) + work.base() * BETA_ONE + START


def refusal(work: Work) -> str:
    """Why these strategies are not taken for `work`, whatever they are modelled to take."""
    if not work.compute_bound:
        return "bytes decide, and fused kernels read W once as well"
    return ""
