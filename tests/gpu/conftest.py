"""Tests that need a CUDA or ROCm device; without one each is skipped, saying so."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

#: The tuner and the benchmarks.
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA or ROCm device, and torch finds none")
    yield torch.device("cuda", torch.cuda.current_device())
    torch._dynamo.reset()
    torch.cuda.empty_cache()
