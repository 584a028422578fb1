"""The rates of GPUs: from data sheets, or measured on this machine by benchmarks/calibrate.py."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lorafx.kernels.cpu.compiler import cache_folder


@dataclass(frozen=True)
class Chip:
    """The rates that kernels reach on a GPU, in SI units.

    Attributes:
        tensor_rate: FLOP/s of a GEMM of 16-bit types.
        fma_rate: FLOP/s outside of tensor cores, which is what float32 gets (no TF32 rounding).
        processors: streaming multiprocessors, which share l2_bandwidth.
        launch: seconds that one more dependent kernel costs inside a captured graph.
        triton_over_vendor: speed of a plain Triton GEMM over the vendor's where FLOPs decide;
            None while unmeasured.
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
        return self.tensor_rate if dtype in (torch.float16, torch.bfloat16) else self.fma_rate


#: Assumed shares of a data sheet's figures that kernels reach.
MEMORY, FLOPS = 0.87, 0.70
#: Figures of L2 are from a few microbenchmarks.
CHIPS: Mapping[tuple[str, int | str], Chip] = {
    ("cuda", 80): Chip("A100", MEMORY * 2.04e12, 4.0e12, FLOPS * 312e12, FLOPS * 19.5e12, 108),
    # Measured on an H200 (torch 2.11, CUDA 13.0, Triton 3.6, 2026-11-20). The cache's figure is
    # what a tile loop over W reached: x and W read by 224 programs in 59.6 µs. GEMMs of 8,192 rows
    # reached 6.79e14 to 6.94e14 FLOP/s one after the other (2026-11-27), 7.85e14 on a cool chip.
    ("cuda", 90): Chip(
        "H200", 4.29e12, 5.9e12, 6.82e14, 5.09e13, 132, 1.02e-6, triton_over_vendor=0.70
    ),
    ("cuda", 100): Chip("B200", MEMORY * 8.0e12, 12e12, FLOPS * 2250e12, FLOPS * 75e12, 148),
    ("hip", "gfx942"): Chip(
        "MI300X", MEMORY * 5.3e12, 8.0e12, FLOPS * 1307e12, FLOPS * 81.7e12, 304
    ),
}
DEFAULT_CHIP = CHIPS["cuda", 90]


def chip_of(device: torch.device) -> Chip:
    """The chip behind `device`, calibrated if it was measured on this machine; else the H200."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return DEFAULT_CHIP
    return load_chip(torch.cuda.get_device_name(device)) or assumed_chip(device)


def assumed_chip(device: torch.device) -> Chip:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        architecture = properties.gcnArchName.partition(":")[0]
        return CHIPS.get(("hip", architecture), CHIPS["hip", "gfx942"])
    if (properties.major, properties.minor) < (9, 0):
        return CHIPS["cuda", 80]
    return CHIPS["cuda", 100 if properties.major >= 10 else 90]


def chip_file(name: str) -> Path:
    """The file of measured figures for the device `name` and this version of torch."""
    plain = re.sub(r"\W+", "-", name)
    return cache_folder() / "chips" / f"{plain}-torch{torch.__version__}.json"


@functools.cache
def load_chip(name: str) -> Chip | None:
    path = chip_file(name)
    return Chip(**json.loads(path.read_text())) if path.exists() else None
