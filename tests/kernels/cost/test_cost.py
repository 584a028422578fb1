"""The GPU cost models against what was measured (benchmarks/results/README.md), and what they
refuse.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from lorafx.kernels.cost.chips import CHIPS, DEFAULT_CHIP, Chip
from lorafx.kernels.cost.roofline import (
    FUSED,
    GPU_STRATEGIES,
    START,
    Estimate,
    byte_floor,
    estimate,
    work_of,
)

pytestmark = pytest.mark.quick


@dataclass(frozen=True)
class Site:
    in_features: int
    out_features: int


BF16 = torch.bfloat16
LLAMA_8B = (
    (Site(4096, 4096), Site(4096, 1024), Site(4096, 1024)),
    (Site(4096, 4096),),
    (Site(4096, 14336), Site(4096, 14336)),
    (Site(14336, 4096),),
)


def estimates(layer: int, rows: int, slots: int, chip: Chip = DEFAULT_CHIP) -> dict[str, Estimate]:
    return estimate(work_of(LLAMA_8B[layer], rows, slots, 16, BF16, chip))


def choices(rows: int, slots: int, chip: Chip = DEFAULT_CHIP) -> list[str]:
    return [next(iter(estimates(layer, rows, slots, chip))) for layer in range(4)]


def test_decode_splits_the_base_product() -> None:
    """The fastest of what was tried on an H200, by 1 to 64 rows and 1 to 32 adapters."""
    for rows, slots in ((1, 8), (8, 8), (64, 1), (64, 8), (64, 32)):
        assert choices(rows=rows, slots=slots) == ["split"] * 4


@pytest.mark.parametrize("slots", [1, 8])
def test_prefill_keeps_the_vendor_gemm_until_triton_is_as_fast(slots: int) -> None:
    around = {"segments", "concat"}
    assert set(choices(rows=8192, slots=slots)) <= around
    for speed, said in ((None, "was not measured"), (0.96, "reaches 0.96 of the vendor GEMM")):
        chip = replace(DEFAULT_CHIP, triton_over_vendor=speed)
        assert set(choices(rows=8192, slots=slots, chip=chip)) <= around
        found = estimates(1, 8192, slots, chip)
        assert said in found["epilogue"].refusal
        assert "refused" in str(found["epilogue"])
        assert not found["segments"].refusal
    fast = replace(DEFAULT_CHIP, triton_over_vendor=1.0)
    assert set(choices(rows=8192, slots=slots, chip=fast)) <= set(FUSED)


@pytest.mark.parametrize(
    ("strategy", "rows", "distinct", "ratio"),
    [("epilogue", 64, 8, 1.56), ("gemv", 1, 1, 1.19)],
)
def test_what_an_h200_took(strategy: str, rows: int, distinct: int, ratio: float) -> None:
    """A layer's linears over the vendor's GEMMs, within a tenth."""
    found = [estimates(layer, rows, distinct)[strategy] for layer in range(4)]
    base = sum(own.seconds / own.over_base for own in found)
    assert sum(own.seconds for own in found) / base == pytest.approx(ratio, rel=0.1)


def test_every_strategy_is_estimated_and_none_beats_the_floor() -> None:
    for chip in CHIPS.values():
        for layer in range(4):
            for rows, distinct in ((1, 1), (7, 3), (64, 8), (8192, 8)):
                found = estimates(layer, rows, distinct, chip)
                assert set(found) == set(GPU_STRATEGIES)
                assert all(e.over_floor >= 1 - 1e-9 and e.over_base >= 1 for e in found.values())


def test_decode_floor_is_the_byte_floor() -> None:
    for sites in LLAMA_8B:
        work = work_of(sites, 1, 1, 16, BF16, DEFAULT_CHIP)
        floor = (work.floor() - START) / work.base()
        assert floor == pytest.approx(byte_floor(sites, 16, 1), rel=1e-3)
