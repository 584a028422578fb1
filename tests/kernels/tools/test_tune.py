"""The tile search: a deterministic clock, the cache, its problems in the interpreter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lorafx.kernels.triton.triton_ops  # noqa: F401  registers them
from lorafx.kernels.cost.chips import DEFAULT_CHIP
from lorafx.kernels.tools.expert_problem import ExpertProblem
from lorafx.kernels.tools.tile_cost import TileSet, fits, predicted
from lorafx.kernels.tools.triton_variants import expert_specs, representative_specs
from lorafx.kernels.tools.tune import Problem, neighbours, search, tune
from lorafx.kernels.triton import tuned_cache
from lorafx.kernels.triton.strategy_tiles import TUNED, tiles_for, tuning_key
from lorafx.kernels.triton.triton_build import build
from lorafx.kernels.triton.triton_tiles import ARCHITECTURES, Tiles
from lorafx.kernels.triton.tuned_cache import load_tuned, save_tuned, tuned_file

SPECS = representative_specs()
LAYER = SPECS["o_r16_bf16"]
H200 = ARCHITECTURES["cuda90"]
STRATEGIES = ("split", "epilogue", "recompute", "segments", "gemv")


def model(strategy: str, rows: int):
    return lambda tiles: predicted(strategy, tiles, LAYER.delta, rows, H200, DEFAULT_CHIP)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    before = dict(TUNED)
    TUNED.clear()
    monkeypatch.setattr(tuned_cache, "cache_folder", lambda: tmp_path)
    load_tuned.cache_clear()
    yield tmp_path
    TUNED.clear()
    TUNED.update(before)
    load_tuned.cache_clear()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_search_ends_where_no_single_change_is_faster(strategy: str) -> None:
    timer = model(strategy, 64)
    found = search(strategy, LAYER.delta, 64, H200, DEFAULT_CHIP, timer, most=10_000)
    assert found.seconds == timer(found.tiles) <= found.heuristic
    for other in neighbours(strategy, found.tiles, LAYER.delta, H200):
        assert timer(other) >= found.seconds


def test_a_clock_that_disagrees_with_the_model_wins() -> None:
    """The clock likes one tile, four single changes from the heuristic's; the search finds it."""
    start = tiles_for("recompute", LAYER.delta, 64, H200)["recompute"]
    target = replace(start, block_n=128, block_k=128, num_warps=8, num_stages=3)

    def timer(tiles: TileSet) -> float:
        own = tiles["recompute"]
        names = ("block_n", "block_k", "num_warps", "num_stages", "block_m", "block_r", "group_m")
        wrong = sum(getattr(own, name) != getattr(target, name) for name in names)
        return 1e-5 * (1 + wrong)

    found = search("recompute", LAYER.delta, 64, H200, DEFAULT_CHIP, timer)
    assert found.tiles == {"recompute": target}
    assert found.seconds < found.heuristic


def test_what_the_model_calls_hopeless_is_not_timed() -> None:
    asked: list[TileSet] = []
    worst = model("epilogue", 4096)

    def timer(tiles: TileSet) -> float:
        asked.append(tiles)
        return 1.0

    found = search("epilogue", LAYER.delta, 4096, H200, DEFAULT_CHIP, timer)
    assert found.pruned > 0
    assert found.timed == len(asked)
    assert all(worst(tiles) <= 2.0 * worst(asked[0]) for tiles in asked)


def test_the_search_stops_at_its_budget_and_survives_tiles_that_do_not_run() -> None:
    calls = 0

    def timer(tiles: TileSet) -> float:
        nonlocal calls
        calls += 1
        return 1.0 if calls == 1 else math.inf

    found = search("epilogue", LAYER.delta, 64, H200, DEFAULT_CHIP, timer, most=7)
    assert calls == found.timed == 7
    assert found.tiles == tiles_for("epilogue", LAYER.delta, 64, H200)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_kernels_of_a_strategy_agree_and_fit_in_all_that_is_tried(strategy: str) -> None:
    start = tiles_for(strategy, LAYER.delta, 64, H200)
    for tiles in neighbours(strategy, start, LAYER.delta, H200):
        assert len({own.parts for own in tiles.values()}) == 1
        changed = {name for name in tiles if tiles[name] != start[name]}
        assert all(fits(name, tiles[name], LAYER.delta, H200) for name in changed)


def test_the_model_of_a_tile() -> None:
    """One wide tile leaves 131 processors idle; deep pipelines keep memory busy."""
    base = tiles_for("recompute", LAYER.delta, 1, H200)["recompute"]
    timer = model("recompute", 1)
    few = {"recompute": replace(base, block_n=256, num_stages=2, block_k=32)}
    assert timer(few) > timer({"recompute": base})
    floor = 4096 * 4096 * 2 / DEFAULT_CHIP.bandwidth
    assert floor < timer({"recompute": base}) < 2 * floor


def test_winners_are_used_and_kept_on_disk(empty_cache: Path) -> None:
    device = torch.device("cpu")
    arch = ARCHITECTURES["interpreter"]
    want = tiles_for("recompute", LAYER.delta, 8, arch)["recompute"]
    want = replace(want, block_n=want.block_n // 2)

    def timer(tiles: TileSet) -> float:
        return 1e-3 if tiles["recompute"] == want else 2e-3

    found = tune(LAYER, "recompute", 8, device, timer=timer)
    assert found.tiles == {"recompute": want}
    assert tiles_for("recompute", LAYER.delta, 7, arch) == found.tiles  # the same bucket
    assert tiles_for("recompute", LAYER.delta, 9, arch) != found.tiles

    TUNED.clear()  # another process
    load_tuned.cache_clear()
    assert tiles_for("recompute", LAYER.delta, 8, arch) != found.tiles
    assert load_tuned(arch) == 1
    assert tiles_for("recompute", LAYER.delta, 8, arch) == found.tiles


def test_a_build_uses_what_is_on_disk(empty_cache: Path) -> None:
    arch = ARCHITECTURES["interpreter"]
    want = {"recompute": Tiles(block_m=16, block_n=32, block_k=64)}
    TUNED[tuning_key("recompute", arch, LAYER.delta, 8)] = want
    save_tuned(arch)
    TUNED.clear()
    device = torch.device("cpu")
    by_disk = build(LAYER, "recompute", rows_hint=8, device=device)
    assert by_disk == build(LAYER, "recompute", rows_hint=8, device=device, tiles=want)


@pytest.mark.parametrize("text", ["{", "[1]", '[{"spec": {"of": "another version"}}]'])
def test_a_damaged_file_leaves_the_heuristic(empty_cache: Path, text: str) -> None:
    arch = ARCHITECTURES["interpreter"]
    want = tiles_for("recompute", LAYER.delta, 8, arch)
    path = tuned_file(arch)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    load_tuned.cache_clear()
    assert load_tuned(arch) == 0
    assert tiles_for("recompute", LAYER.delta, 8, arch) == want


def test_files_are_by_architecture_and_versions(empty_cache: Path) -> None:
    names = {tuned_file(arch).name for arch in ARCHITECTURES.values()}
    assert len(names) == len(ARCHITECTURES)
    assert all(torch.__version__ in name for name in names)
    assert load_tuned(H200) == 0


@pytest.mark.parametrize("name", ["qwen3_up_r16_bf16", "qwen3_down_r16_bf16"])
def test_experts_are_searched_too(name: str) -> None:
    spec = expert_specs()[name]
    strategy = "grouped" if spec.activation is None else "activated"

    def timer(tiles: TileSet) -> float:
        return predicted(strategy, tiles, spec.delta, 4, H200, DEFAULT_CHIP, spec.experts)

    found = search(
        strategy, spec.delta, 4, H200, DEFAULT_CHIP, timer, experts=spec.experts, most=10_000
    )
    assert found.seconds == timer(found.tiles) <= found.heuristic
    one = predicted(strategy, found.tiles, spec.delta, 4, H200, DEFAULT_CHIP)
    assert found.seconds > 10 * one
    assert any(tiles.overlap for tiles in found.tiles.values()) == (strategy == "grouped")


@pytest.mark.parametrize("name", ["odd_up_r5_fp32", "odd_down_r8_bf16", "gptoss_down_r16_bf16"])
def test_a_problem_of_experts_runs_its_kernels(name: str) -> None:
    spec = expert_specs()[name]
    spec = replace(spec, experts=3)
    if name.startswith("gptoss"):
        delta = replace(spec.delta, in_features=32, columns=24, sizes=(24,))
        spec = replace(spec, delta=delta)
    strategy = "grouped" if spec.activation is None else "activated"
    torch.manual_seed(0)
    problem = ExpertProblem.random(spec, 3, torch.device("cpu"))
    kernel = build(spec, strategy, rows_hint=3, device=torch.device("cpu"))
    assert kernel is not None
    result = problem.run(strategy, kernel)
    assert result.shape == (9, spec.out_features)
    assert result.isfinite().all()
    assert 0.1 < result.float().std() < 10


@pytest.mark.parametrize("strategy", [*STRATEGIES, "embedding"])
def test_a_problem_runs_its_kernel(strategy: str) -> None:
    """What the clock would time is a call that runs and has a result of the right size."""
    name = "embedding_r16_bf16" if strategy == "embedding" else "odd_r5_bf16"
    spec = SPECS[name]
    if strategy == "embedding":
        delta = replace(spec.delta, columns=40, sizes=(40,))
    else:
        delta = replace(spec.delta, in_features=33)
    spec = replace(spec, delta=delta)
    torch.manual_seed(0)
    problem = Problem.random(spec, 3, torch.device("cpu"))
    kernel = build(spec, strategy, rows_hint=3, device=torch.device("cpu"))
    before = problem.y.clone()
    result = problem.run(strategy, kernel)
    assert result.shape == (3, spec.out_features)
    assert result.isfinite().all()
    assert 0.1 < (result - before).float().std() < 10
