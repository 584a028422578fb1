"""Tests that need a CUDA or ROCm device; without one each is skipped, saying so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA or ROCm device, and torch finds none")
    yield torch.device("cuda", torch.cuda.current_device())
    torch._dynamo.reset()
    torch.cuda.empty_cache()
