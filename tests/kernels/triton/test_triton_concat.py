"""The strategy "concat": blocks of columns, what is no number, what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from triton_cases import BF16, CPU, FP16, FP32, assert_right, kernel_of, lora, make_case, run

from lorafx.errors import LoweringError
from lorafx.kernels.triton.build import build, plan_of
from lorafx.kernels.triton.concat_ops import columns_of, concat_linear


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
