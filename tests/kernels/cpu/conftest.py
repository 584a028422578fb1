"""Numbers of threads that kernels share their work out among, and kernels that do not compile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

import pytest
import torch

from lorafx.errors import LoweringError
from lorafx.kernels.cpu import (
    attention,
    delta_kernels,
    dense_attention,
    grouped_mm,
    kernels,
    weight_mm,
)
from lorafx.kernels.cpu.compiler import ISAS

KINDS = (attention, delta_kernels, dense_attention, grouped_mm, weight_mm)


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def tried_anew() -> Iterator[None]:
    """Kernels are loaded anew in the test, and after it for this machine's own instructions."""
    for kind in KINDS:
        kind.GENERATED.forget()
    yield
    for kind in KINDS:
        kind.GENERATED.forget()


@pytest.fixture
def refused_sources(tried_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler refuses the source of each generated kernel."""

    def refuse(source: str, flags: tuple[str, ...]) -> NoReturn:
        raise LoweringError("refused")

    monkeypatch.setattr(kernels, "best_isa", lambda: ISAS[0])
    monkeypatch.setattr(kernels, "compile_library", refuse)
