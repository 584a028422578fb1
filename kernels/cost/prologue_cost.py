"""What it saves to compute a linear's input in its shrink, with deltas that were deferred to there.

    deferred    vendor GEMM and shrink; y is not read and written once more for its delta
    prologue    activation with the deferred deltas and the shrink in it; vendor GEMM; expand

The activation is a kernel of the base model as well. It moves as much there, so what counts is how
much longer it takes: the factors that it reads, the FLOPs where they are more than its bytes, and
what other kernels of deltas were measured to take over their roofline. No chip has timed it yet.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorafx.kernels.cost import vendor_cost
from lorafx.kernels.cost.work import (
    ADAPTER,
    DOT,
    START,
    Estimate,
    Work,
    adapters_in_tile,
    padded_rows,
)


def estimate_deferred(work: Work) -> Estimate:
    """A node whose delta its reader adds."""
    return _estimate(work, work.vendor() + vendor_cost.shrink(work) + _further(work))


def estimate_prologue(work: Work, deferred: Sequence[Work], reads: int) -> Estimate:
    """A node whose shrink computes its input.

    Args:
        deferred: the nodes whose deltas are added to what is read.
        reads: columns that the activation reads for each row.
    """
    M, K, G = work.rows, work.in_features, len(work.sizes)
    base = work.kernel(M * (reads + K), 0, 0)
    factors = work.distinct * work.rank * G * K
    factors += sum(one.distinct * one.rank * one.columns for one in deferred)
    flops = 2.0 * _padded(work) * G * K
    flops += sum(2.0 * _padded(one) * one.columns for one in deferred)
    own = vendor_cost.delta_kernel(work, M * (reads + K) + factors, flops) - work.chip.launch
    late = (2 + len(deferred)) * _further(work)
    return _estimate(work, work.vendor() + own - base + late + vendor_cost.expand(work, 2))


def _further(work: Work) -> float:
    """What a tile with several adapters takes for those after the first."""
    return (adapters_in_tile(work) - 1) * ADAPTER


def _padded(work: Work) -> float:
    """Rows times ranks that the products of a factor compute."""
    return padded_rows(work) * max(work.rank, DOT)


def _estimate(work: Work, seconds: float) -> Estimate:
    return Estimate(seconds, seconds / work.vendor(), seconds / (work.floor() + START))
