"""`lorafx::weight_mm_delta` against two ops, bit by bit, and float64."""

from __future__ import annotations

import pytest
import torch
from delta_oracle import Problem, assert_delta, random_problem
from toolchain import needs_compiler
from torch import Tensor

from lorafx.kernels.cpu import delta_kernels, weight_mm
from lorafx.kernels.cpu.weight_source import WeightSpec

pytestmark = [needs_compiler, pytest.mark.usefixtures("threads")]

lora = torch.ops.lorafx
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem_of(slots: list[int], dtype: torch.dtype, **changes) -> Problem:
    settings = {"sizes": (13, 300, 70), "max_rank": 19, "rows": 1, "seed": len(slots)}
    settings |= {"x_shape": (len(slots) * settings["rows"], 133), "slots": slots, **changes}
    return random_problem(dtypes=(dtype,) * 3, **settings)


def kernel_of(p: Problem) -> int:
    kernel = delta_kernels.build(p.spec)
    assert kernel is not None
    return kernel


def base_of(p: Problem) -> tuple[Tensor, Tensor]:
    """(bias, weight) for x and y of the problem."""
    torch.manual_seed(0)
    N, K = p.y.shape[-1], p.x.shape[-1]
    return torch.randn(N).to(p.x.dtype), torch.randn(N, K).to(p.x.dtype)


def check(p: Problem, x: Tensor | None = None) -> Tensor:
    """y of the joined ops, which is right and has the bits of the two."""
    x = p.x if x is None else x
    (bias, weight), kernel = base_of(p), kernel_of(p)
    arguments = (*p.bank, p.rows, kernel)
    for added in (None, bias):
        y = lora.weight_mm(x, weight, added)
        apart = y.clone()
        lora.run_delta_(apart, x, *arguments)
        assert weight_mm.ready(WeightSpec(x.dtype, x.dtype))
        together = lora.weight_mm_delta(x, weight, *arguments, added)
        assert together.is_contiguous()
        assert torch.equal(together, apart)
        assert_delta(p.with_(y=y, x=x), together)
    return together


MIXES = ([0], [-1] * 3, [0] * 7 + [1, 1, 1, 2, 2, -1, 0, 1], [0, 1, 2, 3, -1] * 12, [1] * 40)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slots", MIXES, ids=len)
def test_rows_of_all_kinds(slots: list[int], dtype: torch.dtype) -> None:
    """Slots of rank 19 to rank 0 of the second sibling, and columns that fill no vector."""
    check(problem_of(slots, dtype))


@pytest.mark.parametrize(
    "changes",
    [
        {"sizes": (1031, 2, 900)},  # several shares of columns a thread, ranges that begin within
        {"siblings": (2, 0)},
        {"rows": 5},
        *({"max_rank": rank, "sizes": (96,)} for rank in (1, 4, 8, 16, 33)),
    ],
    ids=str,
)
def test_sizes(changes: dict) -> None:
    check(problem_of([2, 0, 0, 1, 0, -1, 3, 0], torch.float32, **changes))


@pytest.mark.parametrize("rows", [0, 64, 65, 200])
def test_the_library_takes_over_from_some_rows_on(rows: int) -> None:
    slots = [0, 1, -1, 2] * (rows // 4) + [0] * (rows % 4) or [0]
    check(problem_of(slots, torch.float32, x_shape=(rows, 133)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_in_every_batch(dtype: torch.dtype) -> None:
    slots = [0, -1, 1, 1, 2, 0, 0, 3, -1, 0, 0, 0, 0, 1]
    whole = problem_of(slots, dtype)
    (_, weight), kernel = base_of(whole), kernel_of(whole)
    together = lora.weight_mm_delta(whole.x, weight, *whole.bank, 1, kernel)
    assert torch.equal(together[1:2], lora.weight_mm(whole.x[1:2], weight))
    for some in ([0], [1, 8], [2, 5, 13], [0, 5, 6, 9, 10, 11, 12]):
        bank = whole.bank._replace(slots=whole.slots[some])
        alone = lora.weight_mm_delta(whole.x[some], weight, *bank, 1, kernel)
        assert torch.equal(alone, together[some])


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias: bool) -> None:
    p = problem_of([0, -1, 1], torch.float32, max_rank=3)
    (added, weight), kernel = base_of(p), kernel_of(p)
    # What lies beyond a slot's rank is NaN, which opcheck's comparisons of inputs do not expect.
    bank = p.bank._replace(A=p.A.nan_to_num(), B=p.B.nan_to_num())
    last = added if bias else None, [13, 370]
    arguments = p.x, weight, *bank, 1, kernel, *last
    assert set(torch.library.opcheck(lora.weight_mm_delta.default, arguments).values()) == {
        "SUCCESS"
    }


def test_before_the_kernels_are_there(monkeypatch) -> None:
    """The ops' own implementations, which also run off the CPU."""
    monkeypatch.setattr(weight_mm, "ready", lambda spec: False)
    p = problem_of([0, -1, 1], torch.float32)
    (bias, weight), kernel = base_of(p), kernel_of(p)
    for added in (None, bias):
        got = weight_mm.product_and_delta(p.x, weight, p.bank, 1, kernel, added)
        assert_delta(p.with_(y=lora.weight_mm(p.x, weight, added)), got)
