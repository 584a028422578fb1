"""The strategy "persistent" as modelled: shrink, then a product of our own at the vendor's speed.

It is taken where FLOPs decide and the chip's calibration found it fast enough; nowhere until then.
"""

from __future__ import annotations

from lorafx.kernels.cost.vendor_cost import shrink
from lorafx.kernels.cost.work import DOT, START, Work, adapters_in_tile

#: A product of our own this much slower than the vendor's costs more than all of LoRA.
LEAST = 0.97


def persistent(work: Work) -> float:
    """The expand is one more step of each tile's loop over K, of two products: v is two numbers."""
    M, N, G = work.rows, work.columns, len(work.sizes)
    steps = 2 * max(work.rank, DOT) * adapters_in_tile(work)
    B, v = work.distinct * work.rank * N, 2 * M * G * work.rank
    speed = work.chip.persistent_over_vendor or 1.0
    return shrink(work) + work.base(B + v, 0, 2.0 * M * N * steps) / speed + START


def refusal(work: Work) -> str:
    """Why it is not taken for `work`, whatever it is modelled to take."""
    speed = work.chip.persistent_over_vendor
    if not work.compute_bound:
        return "bytes decide, and its tiles are for many rows"
    if work.dtype.itemsize != 2:
        return "its products are of 16-bit types"
    if any(n * work.dtype.itemsize % 16 for n in (work.in_features, work.columns)):
        return "rows do not begin at multiples of 16 bytes"
    if speed is None:
        return "the persistent product was not measured against the vendor GEMM"
    if speed < LEAST:
        return f"the persistent product reaches {speed:.2f} of the vendor GEMM"
    return ""
