"""The tile search: a deterministic clock, the winners on disk, its problems in the interpreter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tile_cost import fits, predicted
from triton_variants import representative_specs
from tune import LinearProblem, neighbours, search, tune

from lorafx.errors import LorafxWarning
from lorafx.kernels.cost.chips import DEFAULT_CHIP
from lorafx.kernels.triton import build as module
from lorafx.kernels.triton.build import (
    TUNED,
    build,
    load_tuned,
    plan_of,
    tiles_for,
    tuned_file,
    tuning_key,
)
from lorafx.kernels.triton.tiles import ARCHITECTURES

CPU = torch.device("cpu")
SPECS = representative_specs()
LAYER = SPECS["o_r16_bf16"]
TABLE = SPECS["embedding_r16_bf16"]
H200, INTERPRETER = ARCHITECTURES["cuda90"], ARCHITECTURES["interpreter"]
STRATEGIES = ("split", "epilogue", "segments", "gemv")


def model(strategy: str, rows: int):
    return lambda tiles: predicted(strategy, tiles, LAYER.delta, rows, H200, DEFAULT_CHIP)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    before = dict(TUNED)
    TUNED.clear()
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path)
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
        assert len({own.parts for own in other.values()}) == 1
        changed = {name for name in other if other[name] != found.tiles[name]}
        assert all(fits(name, other[name], LAYER.delta, H200) for name in changed)


def test_the_search_stops_at_its_budget_and_survives_tiles_that_do_not_run() -> None:
    times = iter([1.0, *[math.inf] * 6])
    found = search("epilogue", LAYER.delta, 64, H200, DEFAULT_CHIP, lambda _: next(times), most=7)
    assert found.timed == 7
    assert found.tiles == tiles_for("epilogue", LAYER.delta, 64, H200)


def test_winners_are_used_and_kept_on_disk(empty_cache: Path) -> None:
    want = tiles_for("embedding", TABLE.delta, 8, INTERPRETER)["embedding_rows"]
    want = replace(want, block_n=want.block_n // 2)
    found = tune(
        TABLE, "embedding", 8, CPU, timer=lambda tiles: 1.0 + (tiles["embedding_rows"] != want)
    )
    assert found.tiles == {"embedding_rows": want}
    assert tiles_for("embedding", TABLE.delta, 7, INTERPRETER) == found.tiles  # the same bucket
    assert tiles_for("embedding", TABLE.delta, 9, INTERPRETER) != found.tiles

    TUNED.clear()  # another process
    load_tuned.cache_clear()
    assert tiles_for("embedding", TABLE.delta, 8, INTERPRETER) != found.tiles
    kernel = build(TABLE, "embedding", rows_hint=8, device=CPU)
    assert kernel is not None
    assert plan_of(kernel).kernels["embedding_rows"].tiles == want
    assert tuning_key("embedding", INTERPRETER, TABLE.delta, 8) in TUNED


@pytest.mark.parametrize("text", ["{", "[1]", '[{"spec": {"of": "another version"}}]'])
def test_a_damaged_file_leaves_the_heuristic(empty_cache: Path, text: str) -> None:
    want = tiles_for("embedding", TABLE.delta, 8, INTERPRETER)
    path = tuned_file(INTERPRETER)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.warns(LorafxWarning, match="is damaged"):
        assert load_tuned(INTERPRETER) == 0
    assert tiles_for("embedding", TABLE.delta, 8, INTERPRETER) == want


@pytest.mark.parametrize("strategy", [*STRATEGIES, "embedding"])
def test_a_problem_runs_its_kernel(strategy: str) -> None:
    """What the clock would time is a call that runs and has a result of the right size."""
    spec = SPECS["embedding_r16_bf16" if strategy == "embedding" else "odd_r5_bf16"]
    smaller = {"columns": 40, "sizes": (40,)} if strategy == "embedding" else {"in_features": 33}
    spec = replace(spec, delta=replace(spec.delta, **smaller))
    torch.manual_seed(0)
    problem = LinearProblem.random(spec, 3, CPU)
    kernel = build(spec, strategy, rows_hint=3, device=CPU)
    before = problem.y.clone()
    result = problem.run(strategy, kernel)
    assert result.shape == (3, spec.out_features)
    assert 0.1 < (result - before).float().std() < 10
