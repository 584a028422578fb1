"""What is beside the vendor's GEMM, as modelled: shrink and expand over many rows, and "concat".

    concat    B copied behind W, v behind x, then one product of the longer x and W: its FLOPs grow
              by (K + C) / K for C columns

W is copied for its columns at every call. No time of
"concat" was measured on a chip; what it is made of was, on an H200.
"""

from __future__ import annotations

import math

import torch

from lorafx.kernels.cost.work import DOT, READER, START, Work, padded_rows, reader

#: Shrink and expand took 2.1 (gate/up), 3.0 (down) and 3.7 times (q/k/v) their roofline on an H200
#: at 8192 rows.
OVER_ROOFLINE = 3.0
#: Columns that x and W are made longer by at most, and the units in which they come and a vendor's
#: GEMM takes them.
MOST_COLUMNS, UNIT, K_TILE = 256, 16, 64


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


def concat(work: Work) -> float:
    M, K, N, G = work.rows, work.in_features, work.columns, len(work.sizes)
    own = columns_of(work)
    flops = 2.0 * M * N * math.ceil((K + G * own) / K_TILE) * K_TILE
    product = work.kernel(K * N + M * (K + N), work.cached, flops) + START
    beside_w = reader(work, work.distinct * work.rank * N + G * own * N, 0, 0)
    copy = work.kernel(2 * K * N + G * own * N, 0, 0) + work.chip.launch
    zeros = work.kernel(M * G * own, 0, 0) + work.chip.launch
    return shrink(work) + beside_w + copy + zeros + product


def columns_of(work: Work) -> int:
    """Columns of one sibling: a block for each adapter that the batch may have."""
    return work.distinct * math.ceil(work.rank / UNIT) * UNIT


def refusal(work: Work) -> str:
    """Why "concat" is not taken for `work`, whatever it is modelled to take."""
    if not work.compute_bound:
        return "bytes decide, and fused kernels read W once as well"
    columns = len(work.sizes) * columns_of(work)
    if columns > MOST_COLUMNS:
        return f"{columns} more columns of x and W are more than {MOST_COLUMNS}"
    return "x A may overflow float16" if work.dtype == torch.float16 else ""
