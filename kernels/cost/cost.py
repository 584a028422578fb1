"""The cost models: the byte floor of any device, and a roofline of the strategies on a GPU.

    floor(D) = 1 + D · r · Σ_i (K_i + N_i) / Σ_i (K_i · N_i)

A decode step reads W once and the A and B of every distinct adapter in the batch once; siblings
that share x still have an A each. On a GPU a kernel takes

    t = max(device-memory bytes / bandwidth, L2 bytes / L2 bandwidth, FLOPs / rate)

and each kernel after the first one more dependent launch. What the strategies launch:

    recompute   one kernel: every tile of y computes v = x Aᵀ again, for the first adapter of its
                rows beside its loop over K, for each further one in a loop of its own
    epilogue    the shrink to v, then one kernel for base product and expand: y is written once
    split       one kernel of base product, in parts of K, and shrink; one that adds up and expands
                (decode_cost.py)
    gemv        vendor GEMM, then shrink and expand a row at a time: no padding of rows
    segments    vendor GEMM, then shrink and expand by runs of equal slots, padded to 16 rows;
                requests are sorted by slot first, once for all nodes of a graph
    concat      longer operands for the vendor's GEMM (vendor_cost.py)

The chips' constants are those of lorafx.kernels.cost.chips: assumptions until a run on the chip
calibrates them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch

from lorafx.kernels.cost import decode_cost, vendor_cost
from lorafx.kernels.cost.chips import Chip
from lorafx.kernels.cost.work import (
    ADAPTER,
    DOT,
    START,
    TILE_M,
    Estimate,
    Work,
    adapters_in_tile,
    fused_base,
    reader,
)


class Sized(Protocol):
    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...


def byte_floor(sites: Iterable[Sized], rank: int, distinct: int) -> float:
    """Least traffic of these sites with `distinct` adapters of `rank`, over the base's alone.

    Elements are counted, so base and adapters are taken to have one dtype.
    """
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


#: A vendor GEMM this much faster than plain Triton's costs more than all of LoRA (5 % against
#: 0.6 to 5 % of the floor), so below it a fused kernel is not used where FLOPs decide.
LEAST_TRITON_OVER_VENDOR = 0.97


def _recompute(work: Work) -> float:
    adapters, chip = adapters_in_tile(work), work.chip
    padded = max(work.rank, DOT)
    M, K, N = work.rows, work.in_features, work.columns
    beside = fused_base(
        work,
        work.distinct * work.factors,
        work.m_tiles * work.rank * (work.n_tiles * K + adapters * N),
        2.0 * M * padded * (work.n_tiles * K + adapters * N),
    )
    # A further adapter's loop reads x and A once more, after the loop over W and not beside it.
    a_loop = K * (min(max(M, DOT), TILE_M) + padded) * work.dtype.itemsize
    waves = math.ceil(work.m_tiles * work.n_tiles / chip.processors)
    after = waves * (adapters - 1) * a_loop / (chip.l2_bandwidth / chip.processors)
    return beside + after


def _epilogue(work: Work) -> float:
    adapters, G = adapters_in_tile(work), len(work.sizes)
    padded = max(work.rank, DOT) * adapters
    M, K, N = work.rows, work.in_features, work.columns
    A, B = work.distinct * work.rank * G * K, work.distinct * work.rank * N
    v = M * G * work.rank
    shrink = work.kernel(A + M * K + v, 0, 2.0 * M * padded * G * K)
    l2 = work.m_tiles * adapters * work.rank * N
    return shrink + work.chip.launch + fused_base(work, B + v, l2, 2.0 * M * padded * N)


def _gemv(work: Work) -> float:
    M, K, N, G = work.rows, work.in_features, work.columns, len(work.sizes)
    A, B = work.rank * G * K, work.rank * N
    shrink = reader(work, work.distinct * A + M * K, M * A, 2.0 * M * A, tensor=False)
    expand = reader(work, work.distinct * B + 2 * M * N, M * B, 2.0 * M * B, tensor=False)
    return work.vendor() + shrink + expand


def _segments(work: Work) -> float:
    delta = vendor_cost.shrink(work) + vendor_cost.expand(work, 2)
    return work.vendor() + delta + 2 * (adapters_in_tile(work) - 1) * ADAPTER


GPU_STRATEGIES = {
    "split": decode_cost.split,
    "epilogue": _epilogue,
    "recompute": _recompute,
    "gemv": _gemv,
    "segments": _segments,
    "concat": vendor_cost.concat,
}
#: Their own base product instead of the vendor's.
FUSED = ("split", "epilogue", "recompute")
#: What no chip has timed, for who is told of a choice.
UNTIMED: Mapping[str, str] = {
    "concat": "never measured on a chip",
    "split": "its reader measured in an earlier form only",
}


def _refusal(name: str, work: Work) -> str:
    if name == "split" and any(size % 16 for size in (work.in_features, *work.sizes)):
        # Run on a GPU for whole blocks of 16 elements only, but for kernels by themselves.
        return "K or a column count is not a multiple of 16"
    if name == "concat":
        return vendor_cost.refusal(work)
    return slower_than_vendor(work.chip) if name in FUSED and work.compute_bound else ""


def slower_than_vendor(chip: Chip) -> str:
    """Why a base product of our own does not pay where FLOPs decide, "" where it does."""
    speed = chip.triton_over_vendor
    if speed is None:
        return "plain Triton was not measured against the vendor GEMM for this many rows"
    if speed < LEAST_TRITON_OVER_VENDOR:
        return f"plain Triton reaches {speed:.2f} of the vendor GEMM"
    return ""


def estimate(work: Work) -> dict[str, Estimate]:
    """Every strategy's modelled time for `work`, fastest first, refused ones last."""
    seconds = {name: model(work) for name, model in GPU_STRATEGIES.items()}
    refusals = {name: _refusal(name, work) for name in seconds}
    return ranked(seconds, refusals, work.vendor(), work.floor() + START)


def ranked(
    seconds: Mapping[str, float], refusals: Mapping[str, str], base: float, floor: float
) -> dict[str, Estimate]:
    """Strategies with their modelled times, fastest first, refused ones last."""
    order = sorted(seconds, key=lambda name: (bool(refusals[name]), seconds[name]))
    return {
        name: Estimate(seconds[name], seconds[name] / base, seconds[name] / floor, refusals[name])
        for name in order
    }


def work_of(
    sites: Sequence[Sized], rows: int, slots: int, rank: int, dtype: torch.dtype, chip: Chip
) -> Work:
    """Sites that share one x, as the cost model sees them.

    Args:
        sites: siblings of one node; all have the same in_features.
        rows: M of x that the graph is made for.
        slots: adapters the bank holds; a batch is taken to be of min(slots, M) adapters.
        rank: largest rank in the bank.
        dtype: of x, W and the bank.
        chip: whose constants count.
    """
    return Work(
        sites[0].in_features,
        tuple(site.out_features for site in sites),
        max(rows, 1),
        max(1, min(slots, rows)),
        rank,
        dtype,
        chip,
    )
