"""Generated Triton kernels: whose row a row is, and that it depends on nobody else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slowly import few
from triton_cases import (
    BF16,
    FP32,
    LINEARS,
    STRATEGIES,
    Case,
    assert_right,
    kernel_of,
    make_case,
    run,
)

from lorafx.kernels.ops.op_library import BankArgs
from lorafx.kernels.triton.build import ORDER_TILES, tiles_for
from lorafx.kernels.triton.generated import launch_interpreted, load
from lorafx.kernels.triton.launch import LaunchArgs
from lorafx.kernels.triton.tiles import ARCHITECTURES

ALL_ALIKE = 1 << 62
INTERPRETER = ARCHITECTURES["interpreter"]


def sorted_tiles(case: Case, strategy: str, block_m: int = 16) -> dict[str, object]:
    """Tiles of few rows, sorted by slot, so that a batch has several of them."""
    tiles = tiles_for(strategy, case.spec.delta, 16, INTERPRETER)
    return {k: replace(t, ordered=True, block_m=block_m) for k, t in tiles.items()}


@pytest.mark.parametrize(
    "strategy",
    few([*STRATEGIES, "segments, sorted", "epilogue, sorted"], "epilogue", "segments, sorted"),
)
@settings(max_examples=6)
@given(data=st.data())
def test_any_map_of_rows(strategy: str, data: st.DataObject) -> None:
    """Any slots in any order, any rows a request, M not a multiple of anything."""
    slots = data.draw(st.lists(st.integers(-1, 3), min_size=1, max_size=9), label="slots")
    rows = data.draw(st.one_of(st.integers(1, 7), st.just(ALL_ALIKE)), label="rows")
    most = 12 if strategy == "gemv" else 40  # a program a row is slow in the interpreter
    M = data.draw(st.integers(1, most), label="M")
    case = make_case(K=24, sizes=(17, 5), slots=slots, rows=1, rank=3, capacity=4)
    x = torch.randn(M, 24, generator=torch.Generator().manual_seed(M))
    case = case.with_(x=x, y=x[:, :22].clone(), rows=rows)
    name, _, ordering = strategy.partition(", ")
    assert_right(case, name, run(case, name, sorted_tiles(case, name) if ordering else None))


@pytest.mark.parametrize("dtype", few([FP32, BF16], FP32), ids=str)
@pytest.mark.parametrize("strategy", LINEARS)
def test_rows_do_not_see_their_neighbours(strategy: str, dtype: torch.dtype) -> None:
    """Bit-equal with every other row's adapter changed; base rows have the base's own bits."""
    slots = (2, -1, 0, 1, 2, 3)
    case = make_case(K=96, sizes=(33, 20), slots=slots, rows=2, rank=9, dtypes=(dtype,) * 3)
    p = case.problem
    together = run(case, strategy)
    assert torch.equal(together, run(case, strategy))
    base = run(case.with_(slots=torch.full_like(p.slots, -1)), strategy)
    assert torch.equal(together[2:4], base[2:4])
    if strategy in ("segments", "gemv"):
        assert torch.equal(base, p.y)
    for request, slot in ((0, 2), (3, 1), (5, 3)):
        alone = torch.full_like(p.slots, -1)
        alone[request] = slot
        mine = slice(2 * request, 2 * request + 2)
        for others in (alone, torch.full_like(p.slots, slot), p.slots.roll(1)):
            mixed = others.clone()
            mixed[request] = slot
            assert torch.equal(run(case.with_(slots=mixed), strategy)[mine], together[mine])


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_infinite_adapters_stay_in_their_rows(strategy: str, dtype: torch.dtype) -> None:
    """An adapter that overflowed spoils its own requests only, though slots share a product."""
    case = make_case(K=32, sizes=(20,), slots=(0, 1, -1), rows=2, rank=4, dtypes=(dtype,) * 3)
    expected = run(case, strategy)
    broken = case.problem.B.clone()
    broken[1] = torch.inf
    got = run(case.with_(B=broken), strategy)
    assert not got[2:4].isfinite().any()
    assert torch.equal(got[:2], expected[:2])
    assert torch.equal(got[4:], expected[4:])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_slots_change_under_one_kernel(strategy: str) -> None:
    """The same launches on rewritten slots, ranks and banks: what a captured graph replays."""
    case = make_case(K=40, sizes=(24, 12), slots=(0, 1, 2, -1), rows=3, rank=6)
    kernel = kernel_of(case, strategy)
    for seed, slots in enumerate(((2, 2, 2, 2), (-1, -1, -1, -1), (3, 0, -1, 1), (0, 1, 2, 3))):
        other = make_case(K=40, sizes=(24, 12), slots=slots, rows=3, rank=6, capacity=4, seed=seed)
        assert kernel_of(other, strategy) == kernel
        assert_right(other, strategy, run(other, strategy))


@settings(max_examples=30)
@given(slots=st.lists(st.integers(-1, 5), min_size=1, max_size=150))
def test_order(slots: list[int]) -> None:
    kernel = load("order", None, ORDER_TILES, INTERPRETER)
    tensor = torch.tensor(slots, dtype=torch.int32)
    bank = BankArgs(*torch.empty(4, 0), tensor)
    batch = LaunchArgs.of(len(slots), bank, 1, kernel, launch_interpreted)
    assert batch.order is not None
    assert torch.equal(batch.order, torch.argsort(tensor, stable=True).to(torch.int32))
