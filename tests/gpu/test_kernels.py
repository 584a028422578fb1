"""Generated Triton kernels compiled and run on the device, against float64."""

from __future__ import annotations

import pytest
import torch
from on_device import call_of, kernel_on, moved
from triton_cases import BF16, FP16, FP32, STRATEGIES, assert_right, make_case

from lorafx.kernels.cost.chips import CHIPS, chip_of
from lorafx.kernels.triton.tiles import architecture_of

DTYPES = {"fp32": (FP32,) * 3, "bf16": (BF16,) * 3, "fp16": (FP16,) * 3}
BATCHES = {
    "one row": ((1,), 1),
    "decode": ((2, -1, 0, 1, 1, 3, 0, 0), 1),
    "prefill": ((2, -1, 0, 1), 129),
    "one adapter": ((2, 2, 2), 7),
    "base rows only": ((-1,) * 5, 1),
    "all different": (tuple(range(70)), 1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_mixes(device: torch.device, strategy: str, batch: str, dtype: str) -> None:
    slots, rows = BATCHES[batch]
    case = make_case(K=333, sizes=(130, 96), slots=slots, rows=rows, rank=24, dtypes=DTYPES[dtype])
    call = call_of(moved(case, device), strategy, kernel_on(case, strategy, device))
    assert_right(case, strategy, call().cpu())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_results_are_the_same_every_time(device: torch.device, strategy: str) -> None:
    """Partial sums are added in a fixed order: no atomics."""
    slots = tuple(i % 4 for i in range(64))
    case = moved(make_case(K=4096, sizes=(1024,), slots=slots, dtypes=(BF16,) * 3), device)
    call = call_of(case, strategy, kernel_on(case, strategy, device))
    first = call()
    assert all(torch.equal(first, call()) for _ in range(20))


def test_the_device_has_its_row_of_the_tables(device: torch.device) -> None:
    assert chip_of(device) in CHIPS.values()
    properties = torch.cuda.get_device_properties(device)
    assert architecture_of(device).processors == properties.multi_processor_count
