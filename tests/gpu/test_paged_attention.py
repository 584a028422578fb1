"""The kernels of `lorafx::paged_attention` on the device, against the attention of each request."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_merge import error
from paged_steps import TOLERANCE, kept_rows, paged_step

from lorafx.kernels.ops.paged_attention import PAGED_ATTENTION, PagedStep, by_request

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

#: (new tokens, those before) of each request.
STEPS = {
    "decode": [(1, 18), (1, 0), (1, 340), (1, 7)],
    "one request, keys in parts": [(1, 5000)],
    "chunks beside decode": [(1, 700), (150, 90), (33, 0), (1, 64)],
}
HEADS: dict[str, dict[str, Any]] = {
    "llama": {"heads": 8, "group": 4, "size": 128, "page": 16},
    "phi": {"heads": 4, "size": 80},
    "qwen": {"heads": 4, "group": 7, "size": 128},
    "gpt-oss": {"heads": 8, "group": 8, "size": 64, "window": 128, "sinks": True},
    "gemma": {"heads": 4, "group": 2, "size": 256, "cap": 30.0, "window": 100},
    "odd": {"heads": 3, "size": 33, "padding": 3},
}


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("step", STEPS)
def test_steps(device: torch.device, step: str, heads: str, dtype: torch.dtype) -> None:
    call = paged_step(STEPS[step], **HEADS[heads], dtype=dtype, device=device)
    expected = {**call, "cache": call["cache"].clone()}
    want = by_request(PagedStep(**expected))
    got = PAGED_ATTENTION(**call)
    assert error(got.double(), want.double()) <= TOLERANCE[dtype]
    assert torch.equal(kept_rows(call), kept_rows(expected))


@pytest.mark.parametrize("heads", ["llama", "gpt-oss"])
def test_the_host_does_not_wait(device: torch.device, heads: str) -> None:
    for step in STEPS.values():
        call = paged_step(step, **HEADS[heads], dtype=BF16, device=device)
        PAGED_ATTENTION(**call)
        torch.cuda.set_sync_debug_mode("error")
        try:
            PAGED_ATTENTION(**call)
        finally:
            torch.cuda.set_sync_debug_mode("default")
