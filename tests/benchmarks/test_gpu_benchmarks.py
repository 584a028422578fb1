"""What the GPU benchmarks do without a GPU: arms that are right, refusals, budgets, workloads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.usefixtures("bench")


@pytest.mark.slow
def test_every_arm_of_the_layer_benchmark_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    import gpu_layers

    options = gpu_layers.parse(["--self-check"])
    assert gpu_layers.self_check(options) >= 30
    assert "nothing was measured" in capsys.readouterr().out


@pytest.mark.quick
def test_a_wrong_arm_is_not_measured() -> None:
    import gpu_layers
    from gpu_cases import TINY, Copy

    copy = Copy.random(TINY[1], torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"tiny o .* base is off by"):
        gpu_layers.check(TINY[1], copy, {"base": lambda c: c.base})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("name", ["gpu_layers", "gpu_model"])
def test_without_a_gpu_they_refuse(name: str, tmp_path: Path) -> None:
    import importlib

    out = tmp_path / "results.json"
    with pytest.raises(SystemExit, match=f"{name}.py measures on a GPU and this machine has none"):
        importlib.import_module(name).main(["--out", str(out)])
    assert not out.exists()


@pytest.mark.quick
def test_workloads_are_those_of_the_models() -> None:
    from gpu_cases import LAYERS, MIXES, cases

    shapes = {(K, sum(sizes)) for layers in LAYERS.values() for K, sizes in layers.values()}
    assert {(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)} <= shapes
    assert {(8192, 10240), (8192, 8192), (8192, 57344), (28672, 8192)} <= shapes
    assert {(3584, 4608), (3584, 3584), (3584, 37888), (18944, 3584)} <= shapes
    for model, layers in LAYERS.items():
        all_cases = list(cases(model))
        assert len(all_cases) == len(MIXES) * len(layers)
        assert all(case.slots >= case.distinct for case in all_cases)
