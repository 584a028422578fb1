"""The tuner's clock and the benchmarks, on the device, for cases of a second or two."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from triton_cases import STRATEGIES
from triton_variants import representative_specs
from tune import tune

from lorafx.kernels.triton import build as module
from lorafx.kernels.triton.build import TUNED, load_tuned, plan_of, tiles_for
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


@pytest.mark.parametrize("name", ["epilogue", "gemv", "segments"])
def test_an_arm_of_a_linear_is_measured(device: torch.device, name: str) -> None:
    import gpu_linear
    from gpu_protocol import Meter

    case = gpu_linear.Case("test qkv", 1024, (1024, 256, 256), 16, 4, 16, "decode")
    meter = Meter(device, blocks=3, seconds=0.001)
    make = partial(gpu_linear.strategy, name=name)
    base, ours = gpu_linear.measure(case, gpu_linear.Arm(name, ("decode",), make), meter)
    assert (base["arm"], ours["arm"]) == ("A/A", name)
    assert 0.5 < base["median"] < 2
    assert 0.2 < ours["median"] < 50
    kernel = module.build(case.spec(name), name, rows_hint=case.rows, device=device)
    planned = sorted(k.jit.__name__ for k in plan_of(kernel).all_kernels)
    call = make(case, device)(case.copy(device))
    launched = [kernel for kernel, _ in meter.launches(call)]
    assert sorted(k for k in launched if k in planned) == planned
    assert ours["launches"] == len(launched)
