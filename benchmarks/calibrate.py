"""What the GPU of this machine reaches, measured: `python benchmarks/calibrate.py`.

Measured are copies (device memory, and in the second-level cache), matrix products, a chain of
dependent kernels, and lorafx's own GEMM beside the vendor's: until that is known, strategies that
replace the vendor's GEMM are not taken where FLOPs decide.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

import lorafx.kernels.triton.ops  # noqa: F401  registers the op
from lorafx.kernels.cost.chips import Chip, assumed_chip, chip_file, load_chip
from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.kernels.triton.build import TritonSpec, build

Call = Callable[[], object]
#: Seconds of one call, by a name that says what it does.
Clock = Callable[[str, Call], float]

#: Sides of the products measured, elements of the copies, length of the chain of kernels.
SIDE, LARGE, SMALL, CHAIN = 8192, 1 << 30, 4 << 20, 200


def calibrate(
    assumed: Chip, name: str, device: torch.device, clock: Clock, *, scale: int = 1
) -> Chip:
    """`assumed` with every figure measured.

    Args:
        name: of the device, as torch has it.
        scale: makes the problems so many times smaller, for a trial of the code.
    """
    side, large, small = SIDE // scale, LARGE // scale, SMALL // scale

    def copy(elements: int) -> Call:
        source = torch.randint(-(1 << 15), 1 << 15, (elements,), dtype=torch.int16, device=device)
        target = torch.empty_like(source)
        # A kernel: a copy would become a node of its own in a graph, and go another way.
        return lambda: torch.bitwise_not(source, out=target)

    def product(side: int, dtype: torch.dtype) -> Call:
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        return lambda: left @ right

    def chain() -> None:
        for _ in range(CHAIN):
            counter.add_(1)

    counter = torch.zeros(1, device=device)
    vendor, triton = _products(side // 2, side, device)
    return replace(
        assumed,
        name=name,
        bandwidth=2 * 2 * large / clock("copy in device memory", copy(large)),
        l2_bandwidth=2 * 2 * small / clock("copy in the cache", copy(small)),
        tensor_rate=2 * side**3 / clock("bf16 product", product(side, torch.bfloat16)),
        fma_rate=2 * (side // 2) ** 3 / clock("fp32 product", product(side // 2, torch.float32)),
        launch=clock("chain of kernels", chain) / CHAIN,
        triton_over_vendor=clock("vendor GEMM", vendor) / clock("Triton GEMM", triton),
        calibrated=True,
    )


def _products(side: int, rows: int, device: torch.device) -> tuple[Call, Call]:
    """The vendor's and lorafx's own product of (rows, side) with (side, side), base rows only."""
    dtype, rank = torch.bfloat16, 16
    delta = DeltaSpec(dtype, dtype, dtype, side, rank, 1, side, (0,), (0,), (side,))
    kernel = build(TritonSpec(delta, dtype), "epilogue", rows_hint=rows, device=device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    x, weight = normal(rows, side), normal(side, side)
    A, B = normal(1, rank, side), normal(1, rank, side)
    ranks = torch.full((1, 1), rank, dtype=torch.int32, device=device)
    scales = torch.ones(1, 1, device=device)
    slots = torch.full((rows,), -1, dtype=torch.int32, device=device)
    own = torch.ops.lorafx.triton_linear
    return (
        lambda: torch.nn.functional.linear(x, weight),
        lambda: own(x, weight, None, A, B, ranks, scales, slots, 1, kernel),
    )


def device_clock(what: str, call: Call) -> float:
    """Seconds of one call on the GPU: the median of 11 replays of a CUDA graph of five."""
    return replay_seconds([call] * 5, replays=11)


def graph_of(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """`calls` as one CUDA graph. Each is warmed up first, which compiles it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (*calls, *calls[:2]):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def replay_seconds(calls: Sequence[Call], *, replays: int) -> float:
    """Seconds of one of `calls` in a CUDA graph of all: the median of so many replays."""
    graph, times = graph_of(calls), []
    for _ in range(replays + 1):  # the first warms up
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / len(calls))
    return statistics.median(times[1:])


def save_chip(chip: Chip) -> Path:
    """Keep `chip`, named as torch names the device, for this and later processes."""
    path = chip_file(chip.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as scratch:
        json.dump(asdict(chip), scratch, indent=1)
    os.replace(scratch.name, path)
    load_chip.cache_clear()
    return path


def main() -> int:
    if not torch.cuda.is_available():
        print("torch finds no GPU; nothing was measured", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    chip = calibrate(assumed_chip(device), name, device, device_clock)
    for field, value in asdict(chip).items():
        print(f"{field:20s} {value:.4g}" if isinstance(value, float) else f"{field:20s} {value}")
    print(f"wrote {save_chip(chip)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
