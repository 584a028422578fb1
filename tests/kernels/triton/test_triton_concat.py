"""The strategy "concat": what the vendor's GEMM is given is right, for any mix of any rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.library import opcheck
from triton_cases import (
    BF16,
    CPU,
    FP16,
    FP32,
    assert_right,
    kernel_of,
    lora,
    make_case,
    run,
)

from lorafx.errors import LoweringError
from lorafx.kernels.triton.concat_ops import columns_of, concat_linear
from lorafx.kernels.triton.triton_build import build, plan_of

DTYPES = {"fp32": (FP32,) * 3, "bf16": (BF16,) * 3}
BATCHES = {
    "one row": ((1,), 1),
    "decode": ((2, -1, 0, 1, 1, 3, 0, 0), 1),
    "prefill": ((2, -1, 0, 1), 9),
    "one adapter": ((2, 2, 2), 7),
    "base rows only": ((-1,) * 5, 1),
    "all different": (tuple(range(19)), 1),
    "long": ((1, -1, 0), 33),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
def test_mixes(batch: str, dtype: str) -> None:
    slots, rows = BATCHES[batch]
    case = make_case(K=80, sizes=(45, 33), slots=slots, rows=rows, rank=5, dtypes=DTYPES[dtype])
    assert_right(case, "concat", run(case, "concat"))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_base_layouts(transposed: bool, bias: bool) -> None:
    case = make_case(
        K=96, sizes=(33, 20), slots=(1, 0, -1), rows=2, bias=bias, transposed=transposed
    )
    assert_right(case, "concat", run(case, "concat"))


@pytest.mark.parametrize("siblings", [(2, 0), (1,), (2, 1, 0), (1, 2)])
def test_some_of_a_group(siblings: tuple[int, ...]) -> None:
    sizes, slots, dtypes = (40, 9, 31), (1, 0, -1, 2), (BF16,) * 3
    case = make_case(K=64, sizes=sizes, slots=slots, rank=6, siblings=siblings, dtypes=dtypes)
    assert_right(case, "concat", run(case, "concat"))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_rows_do_not_see_their_neighbours(dtype: torch.dtype) -> None:
    """Bit-equal with every other row's adapter changed, and base rows with all others base."""
    slots = (2, -1, 0, 1, 2, 3)
    case = make_case(K=112, sizes=(33, 20), slots=slots, rows=2, rank=9, dtypes=(dtype,) * 3)
    p = case.problem
    together = run(case, "concat")
    base = run(case.with_(slots=torch.full_like(p.slots, -1)), "concat")
    assert torch.equal(together[2:4], base[2:4])
    assert not torch.equal(together[:2], base[:2])
    for request, slot in ((0, 2), (3, 1), (5, 3)):
        mixed = torch.full_like(p.slots, -1)
        mixed[request] = slot
        mine = slice(2 * request, 2 * request + 2)
        assert torch.equal(run(case.with_(slots=mixed), "concat")[mine], together[mine])


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


def test_bad_longer_operands() -> None:
    case = make_case(K=32, sizes=(8, 8), slots=(0, 1))
    p, kernel = case.problem, kernel_of(case, "concat")
    x, w = torch.zeros(2, 96), torch.zeros(16, 96)
    for said, wrong in {
        "x' is torch.float32 \\(2, 95\\), .* \\(M, 32 \\+ 64\\)": (x[:, 1:], w),
        "x' is torch.float64": (x.double(), w),
        "the rows of x": (x.T.contiguous().T, w),
        "W' is torch.float32 \\(15, 96\\)": (x, w[1:]),
        "W' is torch.float32 \\(16, 95\\)": (x, w[:, 1:]),
    }.items():
        with pytest.raises(LoweringError, match=said):
            lora.triton_concat_(*wrong, *p.bank, p.rows, kernel)


def test_opcheck_of_longer_operands() -> None:
    case = make_case(K=32, sizes=(13, 8), slots=(2, -1, 0), rows=2, rank=4)
    p = case.problem  # opcheck compares whole arguments, so no NaN
    case = case.with_(A=p.A.nan_to_num(), B=p.B.nan_to_num())
    kernel = kernel_of(case, "concat")
    more = (0, columns_of(plan_of(kernel).spec, 3))
    longer = (torch.nn.functional.pad(t, more) for t in (p.x, case.weight))
    checks = opcheck(lora.triton_concat_, (*longer, *case.problem.bank, p.rows, kernel))
    assert set(checks.values()) == {"SUCCESS"}


def test_no_rows() -> None:
    case = make_case(K=32, sizes=(13, 8), slots=(2, -1, 0), rows=2, rank=4)
    empty = case.with_(x=case.problem.x[:0], y=case.problem.y[:0])
    assert run(empty, "concat").shape == (0, case.spec.out_features)
