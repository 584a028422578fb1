"""The tuner's clock and the benchmarks, on the device, for cases of a second or two."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from triton_cases import STRATEGIES
from triton_variants import representative_specs
from tune import tune

from lorafx.kernels.triton import build as module
from lorafx.kernels.triton.build import TUNED, load_tuned, tiles_for
from lorafx.kernels.triton.tiles import architecture_of


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tuning_finds_nothing_slower(
    device: torch.device, strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path)
    load_tuned.cache_clear()
    spec = representative_specs()["conv1d_r8_bf16"]
    before = dict(TUNED)
    try:
        found = tune(spec, strategy, 16, device, most=6)
        assert 0 < found.seconds <= found.heuristic < 1e-3
        assert tiles_for(strategy, spec.delta, 16, architecture_of(device)) == found.tiles
    finally:
        TUNED.clear()
        TUNED.update(before)
        load_tuned.cache_clear()


def test_the_layer_benchmark_measures(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_layers.py"])
    import gpu_layers
    from gpu_cases import Case

    options = gpu_layers.parse(["--blocks", "3", "--seconds", "0.001", "--all-strategies"])
    case = Case("test", "qkv", 1024, (1024, 256, 256), 16, 4, 16)
    rows = gpu_layers.measure(case, device, options, {})
    arms = {row["arm"]: row for row in rows}
    assert {"A/A", "lorafx epilogue", "lorafx gemv", "lorafx segments"} <= set(arms)
    assert all(0.2 < row["median"] < 50 for row in rows)
    assert 0.5 < arms["A/A"]["median"] < 2
    assert rows[0]["launches"]["lorafx"] >= 1
