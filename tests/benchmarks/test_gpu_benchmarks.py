"""What the GPU benchmarks do without a GPU: arms that are right, refusals, budgets, workloads."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.usefixtures("bench")


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


@pytest.mark.quick
def test_floors_are_those_of_the_performance_document() -> None:
    """Llama-3-8B's linears, rank 16: 1.006 with one adapter, 1.044 with 8, 1.175 with 32."""
    import gpu_model
    from gpu_cases import LAYERS, Case

    def layer(distinct: int) -> float:
        works = [
            Case("", "", K, sizes, 1, distinct, 16).work(torch.device("cpu"))
            for K, sizes in LAYERS["llama-8b"].values()
        ]
        factors = sum(work.distinct * work.factors for work in works)
        return 1 + factors / sum(work.in_features * work.columns for work in works)

    for distinct, floor in ((1, 1.006), (8, 1.044), (32, 1.175)):
        assert layer(distinct) == pytest.approx(floor, abs=0.02)
        whole = gpu_model.floor_of(gpu_model.config_of(32), 16, distinct)
        assert 1 < whole < layer(distinct)  # the vocabulary's weights have no adapters


@pytest.mark.quick
def test_segments_of_the_peers_cover_every_row_once() -> None:
    import peers

    slots = torch.tensor([2, 0, 2, 2, 0] * 20, dtype=torch.int32)
    batch = peers.sglang_segments(slots)
    starts = batch.seg_indptr.tolist()
    assert starts[0] == 0
    assert starts[-1] == 100
    assert sorted(batch.permutation.tolist()) == list(range(100))
    for index, owner in enumerate(batch.weight_indices.tolist()):
        rows = batch.permutation[starts[index] : starts[index + 1]].long()
        assert 0 < len(rows) <= batch.max_len == 32
        assert slots[rows].unique().tolist() == [owner]


def test_cutting_a_wheel_keeps_the_ops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import peers

    wheel, out = tmp_path / "vllm.whl", tmp_path / "vllm.zip"
    folder = "vllm/lora/ops/triton_ops"
    ops = [f"{folder}/lora_shrink_op.py", f"{folder}/fused_moe_lora_op.py"]
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (*ops, f"{folder}/fused_moe_lora_fp8_op.py", "vllm/_C.abi3.so", "vllm/x.py"):
            archive.writestr(name, "")
    monkeypatch.setattr(sys, "argv", ["peers.py", "cut", str(wheel), str(out)])
    peers.main()
    assert zipfile.ZipFile(out).namelist() == ops
