"""The generated embedding kernel, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from delta_oracle import random_problem, sharing_room
from triton_cases import BF16, FP16, FP32, Case, assert_right, run


def embedding(slots: tuple[int, ...], rows: int, M: int | None = None, **changes: object) -> Case:
    M = len(slots) * rows if M is None else M
    sizes = {"x_shape": (M,), "sizes": (45,), "vocabulary": 19}
    return Case(random_problem(slots=slots, rows=rows, **sizes, **changes), torch.empty(0))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("rank", [1, 5, 40])
def test_against_float64(rank: int, dtype: torch.dtype) -> None:
    case = embedding((2, -1, 0, 1), 3, max_rank=rank, dtypes=(dtype,) * 3)
    got = run(case, "embedding")
    assert_right(case, "embedding", got)
    assert torch.equal(got[3:6], case.problem.y[3:6])
    assert torch.equal(got, run(case.with_(x=case.problem.x.int()), "embedding"))


def test_slots_that_share_room() -> None:
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
