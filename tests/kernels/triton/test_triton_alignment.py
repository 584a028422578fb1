"""Compiled kernels read and write vectors only where those begin at multiples of their width.

Triton chooses vectors by what it knows of pointers and strides: whether they are multiples of 16
is asked at each launch, the rest it derives from the source. A GPU stops a program for a wrong one;
here the PTX is run (ptx_machine), for arguments as nobody needs to align them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from compile_only_gpu import compile_only_gpu
from on_ptx import launch_ptx, run_on_ptx
from ptx_machine import Fault
from torch import Tensor
from triton_cases import BF16, FP32, Case, assert_right, make_case

from lorafx.kernels.triton.strategy_tiles import tiles_for
from lorafx.kernels.triton.triton_tiles import ARCHITECTURES

SLOTS = (0, -1, 2, 3, 1)


def shifted(tensor: Tensor) -> Tensor:
    """The same numbers and strides, one element behind where allocators begin."""
    room = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:]
    return room.view(tensor.shape).copy_(tensor)


def apart(tensor: Tensor) -> Tensor:
    """The same numbers with rows that begin at odd places."""
    room = torch.zeros(tensor.shape[0], tensor.shape[1] + 1, dtype=tensor.dtype)
    return room[:, :-1].copy_(tensor)


def with_tensors(case: Case, change: Any) -> Case:
    p = case.problem
    names = ("y", "x")
    problem = replace(p, **{name: change(getattr(p, name)) for name in names})
    return Case(problem, change(case.weight), case.bias, case.transposed)


@pytest.mark.parametrize("strategy", ["split", "segments"])
def test_some_siblings_of_a_bank_whose_rows_begin_at_odd_places(strategy: str) -> None:
    """B has 49 columns, of which two siblings of 12 are used: their rows are whole vectors long."""
    case = make_case(K=12, sizes=(12, 12, 25), siblings=(0, 1), slots=SLOTS, rank=8)
    assert_right(case, strategy, run_on_ptx(fresh(case), strategy))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["split", "epilogue", "segments"])
def test_sixteen_bits_at_odd_places(strategy: str) -> None:
    sizes, siblings = (40, 16, 24), (0, 2)
    case = make_case(K=75, sizes=sizes, siblings=siblings, slots=SLOTS, dtypes=(BF16,) * 3)
    assert_right(case, strategy, run_on_ptx(fresh(case), strategy))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["epilogue", "recompute", "gemv"])
@pytest.mark.parametrize(("K", "sizes"), [(12, (12, 12, 25)), (20, (16, 32, 13))])
def test_other_strategies_at_odd_places(strategy: str, K: int, sizes: tuple[int, ...]) -> None:
    for siblings in ((0, 1), (0, 2)):
        case = make_case(K=K, sizes=sizes, siblings=siblings, slots=SLOTS, rows=4, rank=8)
        assert_right(case, strategy, run_on_ptx(fresh(case), strategy))


def fresh(case: Case) -> Case:
    """The case with a y of its own, which strategies that add write."""
    return case.with_(y=case.problem.y.clone())


@pytest.mark.parametrize("change", [shifted, apart])
def test_tensors_at_odd_places(change: Any) -> None:
    """The same kernel, with a binary for aligned tensors in Triton's cache: it is not taken."""
    case = make_case(K=32, sizes=(32,), slots=(0, -1, 1, 1), rank=8)
    for own in (case, with_tensors(case, change)):
        assert_right(own, "gemv", run_on_ptx(fresh_like(own), "gemv"))
        assert_right(own, "recompute", run_on_ptx(own, "recompute"))


def fresh_like(case: Case) -> Case:
    """`fresh` at the same place and strides."""
    y = case.problem.y
    room = y.untyped_storage().nbytes() // y.element_size()
    other = torch.zeros(room, dtype=y.dtype).as_strided(y.shape, y.stride(), y.storage_offset())
    return case.with_(y=other.copy_(y))


def test_rows_sorted_by_slot_with_strides_of_no_vector() -> None:
    """Requests of 16 rows: their number is a multiple of 16, what follows from it is not."""
    case = make_case(K=64, sizes=(32,), slots=(0, 1, -1, 2), rows=16, rank=8)
    case = with_tensors(case, apart)
    tiles = tiles_for("segments", case.spec.delta, 4096, ARCHITECTURES["cuda90"])
    tiles = {name: replace(own, block_m=16, num_warps=4) for name, own in tiles.items()}
    assert all(own.ordered for own in tiles.values())
    assert_right(case, "segments", run_on_ptx(fresh_like(case), "segments", tiles))


def test_a_binary_for_aligned_tensors_is_stopped_by_others() -> None:
    """What these tests look for is found: the machine stops where a GPU would."""
    case = make_case(K=32, sizes=(32,), slots=(0, -1, 1, 1), rank=8, dtypes=(FP32,) * 3)
    assert_right(case, "gemv", run_on_ptx(fresh(case), "gemv"))
    odd = with_tensors(case, shifted)

    def as_if_aligned(kernel: Any, grid: Sequence[Any], arguments: Sequence[Any]) -> None:
        aligned = [
            torch.empty(64, dtype=item.dtype) if isinstance(item, Tensor) else item
            for item in arguments
        ]
        options = {"num_warps": kernel.tiles.num_warps, "num_stages": kernel.tiles.num_stages}
        with compile_only_gpu():
            compiled = kernel.jit.warmup(*aligned, grid=tuple(grid), **options)
        launch_ptx(compiled.asm["ptx"], kernel.jit.arg_names, grid, arguments)

    with pytest.raises(Fault, match="misaligned: 16 bytes"):
        run_on_ptx(odd, "gemv", launch=as_if_aligned)
