"""Strategies around the vendor's GEMM: what it is given is right, for any mix of any rows."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck
from triton_cases import AROUND, BF16, FP16, FP32, assert_right, kernel_of, lora, make_case, run

from lorafx.errors import LoweringError

DTYPES = {"fp32": (FP32,) * 3, "bf16": (BF16,) * 3, "fp16": (FP16,) * 3}
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
@pytest.mark.parametrize("strategy", AROUND)
def test_mixes(strategy: str, batch: str, dtype: str) -> None:
    slots, rows = BATCHES[batch]
    case = make_case(K=77, sizes=(45, 33), slots=slots, rows=rows, rank=5, dtypes=DTYPES[dtype])
    assert_right(case, strategy, run(case, strategy))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("strategy", AROUND)
def test_base_layouts(strategy: str, transposed: bool, bias: bool) -> None:
    case = make_case(
        K=70, sizes=(33, 20), slots=(1, 0, -1), rows=2, bias=bias, transposed=transposed
    )
    assert_right(case, strategy, run(case, strategy))


@pytest.mark.parametrize("siblings", [(2, 0), (1,), (2, 1, 0), (1, 2)])
@pytest.mark.parametrize("strategy", AROUND)
def test_some_of_a_group(strategy: str, siblings: tuple[int, ...]) -> None:
    sizes, slots, dtypes = (40, 9, 31), (1, 0, -1, 2), (BF16,) * 3
    case = make_case(K=64, sizes=sizes, slots=slots, rank=6, siblings=siblings, dtypes=dtypes)
    assert_right(case, strategy, run(case, strategy))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("strategy", AROUND)
def test_rows_do_not_see_their_neighbours(strategy: str, dtype: torch.dtype) -> None:
    """Bit-equal with every other row's adapter changed, and base rows with all others base."""
    slots = (2, -1, 0, 1, 2, 3)
    case = make_case(K=90, sizes=(33, 20), slots=slots, rows=2, rank=9, dtypes=(dtype,) * 3)
    p = case.problem
    together = run(case, strategy)
    base = run(case.with_(slots=torch.full_like(p.slots, -1)), strategy)
    assert torch.equal(together[2:4], base[2:4])
    assert not torch.equal(together[:2], base[:2])
    for request, slot in ((0, 2), (3, 1), (5, 3)):
        mixed = torch.full_like(p.slots, -1)
        mixed[request] = slot
        mine = slice(2 * request, 2 * request + 2)
        assert torch.equal(run(case.with_(slots=mixed), strategy)[mine], together[mine])


@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("strategy", AROUND)
def test_what_is_no_number_stays_with_its_rows(strategy: str, factor: str, value: float) -> None:
    case = make_case(K=64, sizes=(32, 16), slots=(0, 1, -1, 1, 2), rank=8, dtypes=(BF16,) * 3)
    sound = run(case, strategy)
    tensor = getattr(case.problem, factor).clone()
    tensor[1, 0, 3] = value
    got = run(case.with_(**{factor: tensor}), strategy)
    others = torch.tensor([0, 2, 4])
    assert torch.equal(got[others], sound[others])
    assert not got[[1, 3]].isfinite().all(1).any()


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck_of_the_expand_before_the_product(bias: bool) -> None:
    case = make_case(K=24, sizes=(13, 8), slots=(2, -1, 0), rows=2, rank=4, bias=bias)
    p = case.problem  # opcheck compares whole arguments, so no NaN
    case = case.with_(A=p.A.nan_to_num(), B=p.B.nan_to_num())
    arguments = (p.x, case.bias, *case.problem.bank, p.rows, kernel_of(case, "expand_first"))
    checks = opcheck(lora.triton_expanded, arguments)
    assert set(checks.values()) == {"SUCCESS"}


def test_opcheck_of_the_product_that_is_added() -> None:
    y, x, weight = torch.randn(6, 21), torch.randn(6, 24), torch.randn(21, 24)
    assert set(opcheck(lora.add_product_, (y, x, weight.T)).values()) == {"SUCCESS"}
    with pytest.raises(LoweringError, match=r"\(6, 24\) times \(21, 24\) is not \(6, 21\)"):
        lora.add_product_(y, x, weight)
    with pytest.raises(LoweringError, match="of one type"):
        lora.add_product_(y, x, weight.T.double())


@pytest.mark.parametrize("strategy", AROUND)
def test_no_rows(strategy: str) -> None:
    case = make_case(K=24, sizes=(13, 8), slots=(2, -1, 0), rows=2, rank=4)
    empty = case.with_(x=case.problem.x[:0], y=case.problem.y[:0])
    assert run(empty, strategy).shape == (0, case.spec.out_features)
