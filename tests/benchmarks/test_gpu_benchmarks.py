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


@pytest.mark.slow
def test_the_model_benchmark_serves_a_tiny_model(capsys: pytest.CaptureFixture[str]) -> None:
    import gpu_model

    gpu_model.main(["--self-check"])
    assert capsys.readouterr().out.count("error over rounding") == 3


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


def test_owners_are_spread_over_the_bank_and_base_rows_have_none() -> None:
    from gpu_cases import Case, owners_of

    def owners(rows: int, distinct: int) -> torch.Tensor:
        case = Case("", "", 64, (64,), rows, distinct, 8)
        return owners_of(case, torch.device("cpu"))

    assert owners(64, 8).unique().tolist() == [0, 4, 8, 12, 16, 20, 24, 28]
    assert len(set(owners(64, 8)[:8].tolist())) == 8  # decode: in turn
    assert owners(8192, 8)[:1024].unique().numel() == 1  # prefill: a prompt after the other
    assert owners(64, 0).tolist() == [-1] * 64


def test_a_budget_leaves_out_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_protocol

    now = 100.0
    monkeypatch.setattr(gpu_protocol.time, "monotonic", lambda: now)
    budget = gpu_protocol.Budget(1.0)
    assert budget.fits("first")
    budget.took(30.0)
    now = 120.0
    assert budget.fits("second")
    now = 130.0
    assert not budget.fits("third")
    assert budget.left_out == ["third"]


def test_weights_come_from_memory_not_from_the_cache() -> None:
    import gpu_protocol

    assert gpu_protocol.copies_for(1 << 30) == gpu_protocol.COPIES == 20
    small = 8 << 20
    assert gpu_protocol.copies_for(small) * small >= 10 * gpu_protocol.CACHE_BYTES
    with pytest.raises(MemoryError, match="20 copies"):
        gpu_protocol.copies_for(1 << 30, free=8 << 30)


def test_ratios_are_those_of_the_timer() -> None:
    """compare() pairs times of the timer that it is given; A/A is exactly 1 here."""
    import protocol

    def base() -> float:
        return 1.0

    def arm() -> float:
        return 1.25

    ratios = protocol.compare(base, {"arm": arm}, blocks=5, timer=lambda call, seconds: call())
    assert {ratio.arm: ratio.median for ratio in ratios} == {"A/A": 1.0, "arm": 1.25}


def test_peers_that_are_not_there_are_told(tmp_path: Path) -> None:
    import peers

    assert "could not be loaded: FileNotFoundError" in str(peers.find("vllm", tmp_path))


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


def test_goals_have_their_steps() -> None:
    import gpu_model

    known = {(kind, distinct) for kind, _, _, mixes in gpu_model.STEPS for distinct in mixes}
    assert set(gpu_model.GOALS) <= known
    assert gpu_model.names_of(5, 2) == ["a0", "a1", "a0", "a1", "a0"]
    assert gpu_model.names_of(2, 0) == [None, None]
    assert isinstance(gpu_model.config_of(8).vocab_size, int)
