"""Generated Triton kernels of one strategy each, interpreted: embeddings, the base product in parts
of K ("split"), longer operands ("concat")."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from delta_oracle import random_problem, sharing_room
from slowly import few
from triton_cases import (
    BF16,
    CPU,
    FP16,
    FP32,
    Case,
    assert_right,
    concat_linear,
    kernel_of,
    lora,
    make_case,
    run,
)

from lorafx.errors import LoweringError
from lorafx.kernels.triton.build import build, plan_of, tiles_for
from lorafx.kernels.triton.ops import columns_of
from lorafx.kernels.triton.tiles import ARCHITECTURES, architecture_of

# --- embeddings ---


def embedding(slots: tuple[int, ...], rows: int, M: int | None = None, **changes: object) -> Case:
    M = len(slots) * rows if M is None else M
    sizes = {"x_shape": (M,), "sizes": (45,), "vocabulary": 19}
    return Case(random_problem(slots=slots, rows=rows, **sizes, **changes), torch.empty(0))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("rank", [1, 5, 40])
def test_an_embedding(rank: int, dtype: torch.dtype) -> None:
    case = embedding((2, -1, 0, 1), 3, max_rank=rank, dtypes=(dtype,) * 3)
    got = run(case, "embedding")
    assert_right(case, "embedding", got)
    assert torch.equal(got[3:6], case.problem.y[3:6])
    assert torch.equal(got, run(case.with_(x=case.problem.x.int()), "embedding"))


def test_an_embedding_in_slots_that_share_room() -> None:
    case = embedding((2, -1, 0, 1), 3)
    shared = Case(sharing_room(case.problem, 2), case.weight)
    assert shared.spec.delta.spacing == 2
    assert torch.equal(run(shared, "embedding"), run(case, "embedding"))


def test_ids_outside_the_table_add_nothing() -> None:
    case = embedding((0, 1), 2)
    wrong = case.problem.x.clone()
    wrong[1], wrong[2] = 19, -1
    got, right = run(case.with_(x=wrong), "embedding"), run(case, "embedding")
    assert torch.equal(got[1:3], case.problem.y[1:3])
    assert torch.equal(got[::3], right[::3])


# --- split ---

SLOTS = (0, 1, 2, 3, -1, 5, 7, 0, 2) * 5


def tiles_of(case, strategy: str):
    return tiles_for(strategy, case.spec.delta, case.problem.x.shape[0], architecture_of(CPU))


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize(("block_m", "window"), [(16, 0), (16, 64), (32, 64)])
@pytest.mark.parametrize("block_r", few([16, 64], 16))
def test_parts_windows_and_chunks(split: int, block_m: int, window: int, block_r: int) -> None:
    case = make_case(K=96, sizes=(64, 32), slots=SLOTS, rank=8, dtypes=(BF16,) * 3)
    tiles = tiles_of(case, "split")
    first = replace(tiles["split"], split=split, swap=True)
    second = replace(tiles["reduce"], split=split, block_m=block_m, window=window, block_r=block_r)
    assert_right(case, "split", run(case, "split", {"split": first, "reduce": second}))


@pytest.mark.parametrize("window", [0, 64])
def test_ranks_that_come_beside_the_slots_and_those_of_slots_behind_them(window: int) -> None:
    """A load has the ranks of the first slots; the others' are looked up. The bits are the same."""
    slots = (0, 40, 3, -1, 15, 16, 17, 63, 2, 3) * 3
    case = make_case(K=64, sizes=(32, 48), slots=slots, rank=8, dtypes=(BF16,) * 3)
    found = []
    for at_once in (0, 16, 64):
        tiles = tiles_of(case, "split")
        changes = {"block_m": 16, "window": window, "at_once": at_once}
        tiles["reduce"] = replace(tiles["reduce"], **changes)
        found.append(run(case, "split", tiles))
        assert_right(case, "split", found[-1])
    assert all(torch.equal(one, found[0]) for one in found)


def test_only_readers_start_early_and_only_where_the_chip_can() -> None:
    from lorafx.kernels.triton.source import source

    case = make_case(K=64, sizes=(64,), slots=(0, 1), dtypes=(BF16,) * 3)
    for name, arch in ARCHITECTURES.items():
        for strategy in ("split", "epilogue", "segments", "gemv"):
            first, last = tiles_for(strategy, case.spec.delta, 2, arch).items()
            texts = [source(kernel, case.spec, tiles) for kernel, tiles in (first, last)]
            assert ["launch_dependents" in text for text in texts] == [arch.overlaps, False], name
            assert ["griddepcontrol.wait" in text for text in texts] == [False, arch.overlaps], name


@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("factor", ["A", "B"])
def test_what_is_no_number_stays_with_its_rows(factor: str, value: float) -> None:
    case = make_case(K=64, sizes=(32, 16), slots=(0, 1, -1, 1, 2), rank=8, dtypes=(BF16,) * 3)
    sound = run(case, "concat")
    tensor = getattr(case.problem, factor).clone()
    tensor[1, 0, 3] = value
    got = run(case.with_(**{factor: tensor}), "concat")
    others = torch.tensor([0, 2, 4])
    assert torch.equal(got[others], sound[others])
    assert not got[[1, 3]].isfinite().all(1).any()


@pytest.mark.parametrize("slots", [(2, -1, 0, 2), (-1, 4, 4), (1,)])
def test_blocks_of_requests(slots: tuple[int, ...]) -> None:
    """Of a bank with more slots than the batch has requests."""
    case = make_case(K=48, sizes=(40, 9, 31), slots=slots, rows=5, rank=6, capacity=7)
    spec, p = replace(case.spec, by_request=True), case.problem
    kernel = build(spec, "concat", rows_hint=20, device=CPU)
    assert kernel is not None
    got = concat_linear(p.x, case.weight, case.bias, p.bank, p.rows, kernel)
    assert_right(case, "concat", got)
    # whatever was in the columns behind x and W
    more = (0, columns_of(plan_of(kernel).spec, len(slots)))
    x, weight = (torch.nn.functional.pad(t, more, value=torch.nan) for t in (p.x, case.weight))
    lora.triton_concat_(x, weight, *p.bank, p.rows, kernel)
    assert torch.equal(torch.addmm(case.bias, x, weight.T), got)


def test_what_cannot_be_made_longer() -> None:
    for said, made in {
        "may overflow float16": make_case(K=32, sizes=(8,), slots=(0,), dtypes=(FP16,) * 3),
        "not of one type": make_case(K=32, sizes=(8,), slots=(0,), dtypes=(BF16, FP32, BF16)),
        "not a multiple of 16": make_case(K=24, sizes=(8,), slots=(0,)),
    }.items():
        with pytest.raises(LoweringError, match=said):
            kernel_of(made, "concat")
