"""Strategies around the vendor's GEMM: what it is given is right, for any mix of any rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.library import opcheck
from triton_cases import (
    AROUND,
    BF16,
    CONCAT,
    CPU,
    FP16,
    FP32,
    Case,
    assert_right,
    kernel_of,
    lora,
    make_case,
    run,
)

from lorafx.errors import LoweringError
from lorafx.kernels.triton.concat_launch import blocks_of, layout_of, longer_reference
from lorafx.kernels.triton.longer import ConcatLayout, Longer
from lorafx.kernels.triton.triton_build import TritonSpec, build, plan_of
from lorafx.kernels.triton.triton_vendor_ops import vendor_linear

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
    if strategy in CONCAT and dtype == "fp16":
        pytest.skip("refused: test_what_cannot_be_made_longer")
    slots, rows = BATCHES[batch]
    case = make_case(K=80, sizes=(45, 33), slots=slots, rows=rows, rank=5, dtypes=DTYPES[dtype])
    assert_right(case, strategy, run(case, strategy))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("strategy", AROUND)
def test_base_layouts(strategy: str, transposed: bool, bias: bool) -> None:
    case = make_case(
        K=96, sizes=(33, 20), slots=(1, 0, -1), rows=2, bias=bias, transposed=transposed
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
    case = make_case(K=112, sizes=(33, 20), slots=slots, rows=2, rank=9, dtypes=(dtype,) * 3)
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


@pytest.mark.parametrize("requests", [False, True])
@pytest.mark.parametrize("strategy", CONCAT)
def test_longer_operands_are_those_of_the_reference(strategy: str, requests: bool) -> None:
    case = make_case(K=48, sizes=(40, 9, 31), slots=(2, -1, 0, 2), rows=5, rank=6)
    case = case.with_(B=case.problem.B.nan_to_num())  # of a slot that no row has
    spec, p = with_blocks(case, requests), case.problem
    x, weight = p.x.clone(), case.weight.clone()
    kernel = build(spec, strategy, rows_hint=20, device=CPU)
    assert kernel is not None
    full = plan_of(kernel).spec
    want_x, want_w = longer_reference(full, x, weight, p.bank, p.rows)
    left, right = layout_of(full).columns(blocks_of(full, p.bank))
    x = torch.nn.functional.pad(x, (left, right), value=torch.nan)
    beside, nobodys = (left + 3, right + 5), {"value": torch.nan}
    weight = torch.nn.functional.pad(weight, (*beside, 2, 1), **nobodys)
    lora.triton_concat_(x, weight, *p.bank, p.rows, left + 3, 2, kernel)
    torch.testing.assert_close(x, want_x, rtol=1e-5, atol=1e-6)
    assert torch.equal(weight[2:-1, 3:-5], want_w)
    weight[2:-1, 3:-5] = torch.nan  # room that was not asked for is left alone
    assert weight.isnan().all()


@pytest.mark.parametrize("slots", [(2, -1, 0, 2), (-1, 4, 4), (1,)])
@pytest.mark.parametrize("strategy", CONCAT)
def test_blocks_of_requests(strategy: str, slots: tuple[int, ...]) -> None:
    """Of a bank with more slots than the batch has requests."""
    case = make_case(K=48, sizes=(40, 9, 31), slots=slots, rows=5, rank=6, capacity=7)
    spec, p = with_blocks(case, True), case.problem
    kernel = build(spec, strategy, rows_hint=20, device=CPU)
    assert kernel is not None
    got = vendor_linear(strategy, p.x, case.weight, case.bias, p.bank, p.rows, kernel)
    assert_right(case, strategy, got)


def with_blocks(case: Case, requests: bool) -> TritonSpec:
    return replace(case.spec, longer=Longer(requests=requests))


def test_where_columns_lie() -> None:
    """Two blocks of 16 columns; a product takes x (80 columns) and what lies up to its own."""

    def spans(longer: Longer, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
        case = make_case(K=80, sizes=sizes, slots=(0,), rank=5)
        layout = ConcatLayout.of(case.spec.delta, longer)
        return [layout.span(place, 2) for place in layout.places]

    assert spans(Longer(), (64, 16, 16)) == [(0, 80 + 96)] * 3
    apart = Longer(apart=True)
    assert spans(apart, (64,)) == [(0, 112)]
    assert spans(apart, (64, 64)) == [(32, 144), (0, 112)]
    # the largest has its own columns alone on the right, the next one on the left
    assert spans(apart, (16, 64, 32)) == [(32, 32 + 80 + 64), (32, 32 + 80 + 32), (0, 32 + 80)]


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
        "x' is torch.float32 \\(2, 95\\), .* \\(M, 0 \\+ 32 \\+ 64\\)": (x[:, 1:], w, 0),
        "x' is torch.float64": (x.double(), w, 0),
        "the rows of x": (x.T.contiguous().T, w, 0),
        "W' is": (x, w[1:], 0),
        "W' has 95 columns": (x, w[:, 1:], 0),
        "x's begin at 1": (x, w, 1),
    }.items():
        long_x, long_w, first = wrong
        with pytest.raises(LoweringError, match=said):
            lora.triton_concat_(long_x, long_w, *p.bank, p.rows, first, 0, kernel)


@pytest.mark.parametrize("strategy", CONCAT)
def test_opcheck_of_longer_operands(strategy: str) -> None:
    case = make_case(K=32, sizes=(13, 8), slots=(2, -1, 0), rows=2, rank=4)
    p = case.problem  # opcheck compares whole arguments, so no NaN
    case = case.with_(A=p.A.nan_to_num(), B=p.B.nan_to_num())
    kernel = kernel_of(case, strategy)
    sides = layout_of(plan_of(kernel).spec).columns(3)
    longer = (torch.nn.functional.pad(t, sides) for t in (p.x, case.weight))
    checks = opcheck(
        lora.triton_concat_, (*longer, *case.problem.bank, p.rows, sides[0], 0, kernel)
    )
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("strategy", AROUND)
def test_no_rows(strategy: str) -> None:
    case = make_case(K=32, sizes=(13, 8), slots=(2, -1, 0), rows=2, rank=4)
    empty = case.with_(x=case.problem.x[:0], y=case.problem.y[:0])
    assert run(empty, strategy).shape == (0, case.spec.out_features)
