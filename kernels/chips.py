"""GPUs as the cost models see them: what kernels reach, assumed from data sheets or measured.

    python -m lorafx.kernels.chips      measure the GPU of this machine, and use that from now on

Measured are copies (device memory, and in the second-level cache), matrix products, a chain of
dependent kernels, and lorafx's own GEMM with no adapter in the batch beside the vendor's: until
that is known, strategies that replace the vendor's GEMM are not taken where FLOPs decide.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from lorafx.kernels.compiler import cache_folder

#: Seconds of one call, by a name that says what it does.
Clock = Callable[[str, Callable[[], object]], float]


@dataclass(frozen=True)
class Chip:
    """What the GPU model takes for granted; SI units, rates that kernels reach, not data sheets'.

    Attributes:
        bandwidth: device memory, bytes/s.
        l2_bandwidth: second-level cache to the cores, bytes/s.
        tensor_rate: FLOP/s of a GEMM of 16-bit types.
        fma_rate: FLOP/s outside of tensor cores, which is what float32 gets (no TF32 rounding).
        processors: how many there are to share l2_bandwidth.
        launch: seconds that one more dependent kernel costs inside a captured graph.
        triton_over_vendor: speed of a plain Triton GEMM over the vendor's where the FLOPs decide;
            None while unmeasured.
        calibrated: whether the figures were measured on the chip.
    """

    name: str
    bandwidth: float
    l2_bandwidth: float
    tensor_rate: float
    fma_rate: float
    processors: int
    launch: float = 2e-6
    triton_over_vendor: float | None = None
    calibrated: bool = False

    def rate(self, dtype: torch.dtype) -> float:
        """FLOP/s of a matrix product with operands of `dtype`."""
        return self.tensor_rate if dtype in (torch.float16, torch.bfloat16) else self.fma_rate


MEMORY, FLOPS = 0.87, 0.70  # reached of the data sheet's figures: assumed
#: Data sheets times what is assumed reachable; the L2 figures are rough (a few microbenchmarks).
CHIPS: Mapping[tuple[str, int | str], Chip] = {
    ("cuda", 80): Chip("A100", MEMORY * 2.04e12, 4.0e12, FLOPS * 312e12, FLOPS * 19.5e12, 108),
    # Measured on an H200 by this module (torch 2.11, CUDA 13.0, Triton 3.6, 2026-11-20), but for
    # the cache: what a tile loop over W reached, x and W read by 224 programs in 59.6 µs.
    ("cuda", 90): Chip(
        "H200", 4.29e12, 5.9e12, 7.5e14, 5.09e13, 132, 1.02e-6, triton_over_vendor=0.70
    ),
    ("cuda", 100): Chip("B200", MEMORY * 8.0e12, 12e12, FLOPS * 2250e12, FLOPS * 75e12, 148),
    ("hip", "gfx942"): Chip(
        "MI300X", MEMORY * 5.3e12, 8.0e12, FLOPS * 1307e12, FLOPS * 81.7e12, 304
    ),
}
DEFAULT_CHIP = CHIPS["cuda", 90]


def chip_of(device: torch.device) -> Chip:
    """The chip behind `device`, calibrated if it was measured on this machine; the H200 where there
    is none to ask (interpreter, fake tensors)."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return DEFAULT_CHIP
    return load_chip(torch.cuda.get_device_name(device)) or _assumed(device)


def _assumed(device: torch.device) -> Chip:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        architecture = properties.gcnArchName.partition(":")[0]
        return CHIPS.get(("hip", architecture), CHIPS["hip", "gfx942"])
    if (properties.major, properties.minor) < (9, 0):
        return CHIPS["cuda", 80]
    return CHIPS["cuda", 100 if properties.major >= 10 else 90]


# --- measured ---


def chip_file(name: str) -> Path:
    """Where the measured figures of the device called `name` are kept, for this torch."""
    plain = re.sub(r"\W+", "-", name)
    return cache_folder() / "chips" / f"{plain}-torch{torch.__version__}.json"


@functools.cache
def load_chip(name: str) -> Chip | None:
    """What was measured on the device called `name`; None where nothing was."""
    path = chip_file(name)
    return Chip(**json.loads(path.read_text())) if path.exists() else None


def save_chip(chip: Chip) -> Path:
    """Keep `chip`, named as torch names the device, for this and later processes."""
    path = chip_file(chip.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as scratch:
        json.dump(asdict(chip), scratch, indent=1)
    os.replace(scratch.name, path)
    load_chip.cache_clear()
    return path


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


def _products(
    side: int, rows: int, device: torch.device
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The vendor's and lorafx's own product of (rows, side) with (side, side), base rows only."""
    from lorafx.kernels.triton_build import build
    from lorafx.kernels.triton_variants import representative_specs
    from lorafx.kernels.tune import Problem

    spec = representative_specs()["o_r16_bf16"]
    delta = replace(spec.delta, in_features=side, columns=side, sizes=(side,))
    spec = replace(spec, delta=delta)
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
    from lorafx.kernels.tune import replay_seconds

    return replay_seconds([call] * 5, replays=11)


def main() -> int:
    """Entry point of `python -m lorafx.kernels.chips`."""
    if not torch.cuda.is_available():
        print("no GPU that torch can use; nothing was measured", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    chip = calibrate(_assumed(device), name, device, device_clock)
    for field, value in asdict(chip).items():
        print(f"{field:20s} {value:.4g}" if isinstance(value, float) else f"{field:20s} {value}")
    print(f"wrote {save_chip(chip)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
