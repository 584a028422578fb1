"""Figures of a chip: computed from timed calls, kept on disk, used by the choice of strategies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import calibrate as tool
import pytest
import torch
from calibrate import calibrate, save_chip

from lorafx.kernels.cost import chips
from lorafx.kernels.cost.chips import DEFAULT_CHIP, load_chip

SECONDS = {
    "copy in device memory": 1e-3,
    "copy in the cache": 1e-6,
    "bf16 product": 2e-3,
    "fp32 product": 4e-3,
    "chain of kernels": 3e-4,
    "vendor GEMM": 1e-3,
    "Triton GEMM": 1.25e-3,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(chips, "cache_folder", lambda: tmp_path)
    load_chip.cache_clear()
    yield tmp_path
    load_chip.cache_clear()


def test_figures_are_work_over_time_and_kept_by_name(folder: Path) -> None:
    def clock(what: str, call: Callable[[], object]) -> float:
        call()
        return SECONDS[what]

    chip = calibrate(DEFAULT_CHIP, "Test GPU", torch.device("cpu"), clock, scale=128)
    side, large, small = tool.SIDE // 128, tool.LARGE // 128, tool.SMALL // 128
    assert chip.bandwidth == pytest.approx(4 * large / 1e-3)  # 16-bit elements, read and written
    assert chip.l2_bandwidth == pytest.approx(4 * small / 1e-6)
    assert chip.tensor_rate == pytest.approx(2 * side**3 / 2e-3)
    assert chip.fma_rate == pytest.approx(2 * (side // 2) ** 3 / 4e-3)
    assert chip.launch == pytest.approx(3e-4 / tool.CHAIN)
    assert chip.triton_over_vendor == pytest.approx(0.8)
    assert load_chip("Test GPU") is None
    save_chip(chip)
    assert load_chip("Test GPU") == chip
    assert load_chip("Other GPU") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_measured(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert tool.main() == 1
    assert "nothing was measured" in capsys.readouterr().err
    assert not list(folder.iterdir())
