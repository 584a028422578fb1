"""What the GPU of this machine reaches, measured.

    python -m lorafx.kernels.tools.calibrate      measure it, and use that from now on

Measured are copies (device memory, and in the second-level cache), matrix products, a chain of
dependent kernels, and lorafx's own GEMMs with no adapter in the batch beside the vendor's: until
that is known, strategies that replace the vendor's GEMM are not taken where FLOPs decide.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from lorafx.kernels.cost.chips import Chip, assumed_chip, save_chip
from lorafx.kernels.tools.triton_variants import representative_specs
from lorafx.kernels.tools.tune import Problem, replay_seconds
from lorafx.kernels.triton.triton_build import TritonSpec, build

#: Seconds of one call, by a name that says what it does.
Clock = Callable[[str, Callable[[], object]], float]

#: Sides of the products measured, elements of the copies, length of the chain of kernels.
SIDE, LARGE, SMALL, CHAIN = 8192, 1 << 30, 4 << 20, 200


def calibrate(
    assumed: Chip, name: str, device: torch.device, clock: Clock, *, scale: int = 1
) -> Chip:
    """`assumed` with every figure measured.

    Args:
        name: of the device, as torch has it.
        clock: how a call is timed.
        scale: makes the problems so many times smaller, for a trial of the code.
    """
    side, large, small = SIDE // scale, LARGE // scale, SMALL // scale

    def copy(elements: int) -> Callable[[], object]:
        source = torch.randint(-(1 << 15), 1 << 15, (elements,), dtype=torch.int16, device=device)
        target = torch.empty_like(source)
        # A kernel: a copy would become a node of its own in a graph, and go another way.
        return lambda: torch.bitwise_not(source, out=target)

    def product(side: int, dtype: torch.dtype) -> Callable[[], object]:
        left = torch.randn(side, side, device=device).to(dtype)
        right = torch.randn(side, side, device=device).to(dtype)
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


def _spec(side: int) -> TritonSpec:
    """Of a square weight."""
    spec = representative_specs()["o_r16_bf16"]
    return replace(spec, delta=replace(spec.delta, in_features=side, columns=side, sizes=(side,)))


def _products(
    side: int, rows: int, device: torch.device
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The vendor's and lorafx's own product of (rows, side) with (side, side), base rows only."""
    spec = _spec(side)
    kernel = build(spec, "epilogue", rows_hint=rows, device=device)
    assert kernel is not None
    problem = Problem.random(spec, rows, device)
    problem.bank[-1].fill_(-1)
    weight = problem.weight
    assert weight is not None
    return (
        lambda: torch.nn.functional.linear(problem.x, weight),
        lambda: problem.run("epilogue", kernel),
    )


def device_clock(what: str, call: Callable[[], object]) -> float:
    """Seconds of one call on the GPU: the median of 11 replays of a CUDA graph of five."""
    return replay_seconds([call] * 5, replays=11)


def main() -> int:
    """Entry point of `python -m lorafx.kernels.tools.calibrate`."""
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
