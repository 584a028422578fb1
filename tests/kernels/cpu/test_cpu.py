"""Generated CPU kernels against float64: sizes, ranks, dtypes, ISAs, layouts, threads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from delta_oracle import Problem, assert_delta, random_problem, sharing_room
from toolchain import needs_compiler

from lorafx.kernels.cpu.compiler import Isa, runnable_isas
from lorafx.kernels.cpu.delta_kernels import build, build_all

lora = torch.ops.lorafx
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


pytestmark = needs_compiler

# K, largest rank, sibling sizes, siblings that y has columns for, dtypes of x, bank and y
GRID = {
    "odd": (77, 5, (13, 17), (0, 1), (FP32, FP32, FP32)),
    "odd bf16": (77, 5, (13, 17), (0, 1), (BF16, BF16, BF16)),
    "one of everything": (1, 1, (1,), (0,), (BF16, BF16, BF16)),
    "three slices": (64, 16, (96, 33, 31), (0, 1, 2), (BF16, BF16, BF16)),
    "some of a group": (64, 16, (96, 33, 31), (2, 0), (FP32, FP32, FP32)),
    "rank 256": (24, 256, (600,), (0,), (FP32, FP32, FP32)),
    "bf16 bank": (40, 8, (48, 7), (0, 1), (FP32, BF16, FP32)),
}
# leading dimensions of x, slots, rows a request
BATCHES = {
    "decode": ((8,), (2, -1, 0, 1, 1, 3, 0, 0), 1),
    "one row": ((1,), (1,), 1),
    "prefill": ((4, 9), (2, -1, 0, 1), 9),
    "wraps around": ((29,), (1, 0, 2), 4),
    "many rows": ((6, 110), (0, -1, 1, 0, 2, 3), 110),
    "no rows": ((0, 3), (0, 1), 3),
}


def problem(name: str, batch: str, **changes: object) -> Problem:
    K, R, sizes, siblings, dtypes = GRID[name]
    leading, slots, rows = BATCHES[batch]
    return random_problem(
        x_shape=(*leading, K),
        slots=slots,
        rows=rows,
        sizes=sizes,
        siblings=siblings,
        max_rank=R,
        dtypes=dtypes,
        **changes,  # type: ignore[arg-type]
    )


def run(p: Problem, isa: Isa | None = None) -> torch.Tensor:
    """y after the generated kernel ran on a copy of it."""
    kernel = build(p.spec, isa)
    assert kernel is not None
    y = p.y.clone(memory_format=torch.preserve_format)
    op = lora.run_embedding_delta_ if p.embedding else lora.run_delta_
    op(y, p.x, *p.bank, p.rows, kernel)
    return y


@pytest.fixture(scope="module", autouse=True)
def _compiled_together() -> None:
    built = build_all(problem(name, "decode").spec for name in GRID)
    assert None not in built.values()


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", GRID)
def test_against_float64(name: str, batch: str) -> None:
    p = problem(name, batch)
    y = run(p)
    assert_delta(p, y)
    for got, before, owner in zip(y.flatten(0, -2), p.y.flatten(0, -2), p.owners(), strict=True):
        assert owner >= 0 or torch.equal(got, before)


@pytest.mark.parametrize("batch", ["decode", "one row", "prefill"])
@pytest.mark.parametrize("name", ["odd", "three slices", "some of a group", "rank 256"])
def test_slots_that_share_room(name: str, batch: str) -> None:
    p = problem(name, batch)
    assert torch.equal(run(sharing_room(p, 2)), run(p))


def of_two_tests(leading: tuple[int, ...], dtypes: tuple[torch.dtype, ...], **rows: Any) -> Problem:
    """Sizes that the tests of instruction sets share: a kernel of each is compiled once."""
    return random_problem(x_shape=(*leading, 77), sizes=(48, 17), max_rank=9, dtypes=dtypes, **rows)


@pytest.mark.parametrize("isa", runnable_isas(), ids=lambda isa: isa.name)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_every_instruction_set(isa: Isa, dtype: torch.dtype) -> None:
    for batch in ("decode", "many rows"):
        leading, slots, rows = BATCHES[batch]
        p = of_two_tests(leading, (dtype,) * 3, slots=slots, rows=rows)
        assert_delta(p, run(p, isa))


@pytest.mark.parametrize("isa", runnable_isas(), ids=lambda isa: isa.name)
@pytest.mark.parametrize("bank", ["same", "fp32"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_storage_types_round_like_torch(isa: Isa, dtype: torch.dtype, bank: str) -> None:
    """y + δ is rounded to nearest even, y + 0 comes back bit for bit; overflow and NaN included.

    One exception: the bfloat16 instructions take subnormals (below 1.2e-38) for zero.
    """
    edges = [0.0, -0.0, 1.0, 65504.0, 3e38, 6e-8, 5.9e-8, 2e-5, 1e-40, torch.inf, torch.nan]
    values = torch.tensor([*edges, *torch.randn(54).tolist()]).to(dtype)
    deltas = torch.cat([torch.zeros(65), torch.randn(65) * 2.0**-8, torch.full((65,), 40.0)])
    wide = dtype if bank == "same" else FP32
    p = of_two_tests((3,), (wide, wide, dtype), slots=(0,), rows=3)
    x, A, B = torch.zeros_like(p.x), torch.zeros_like(p.A[:1]), torch.zeros_like(p.B[:1])
    x[:, 0] = 1
    A[:, 0, ::77] = 1  # of each sibling; so δ is the first row of B
    p = p.with_(
        y=values.repeat(3, 1),
        x=x,
        A=A,
        ranks=torch.ones(1, 2, dtype=torch.int32),
        scales=torch.ones(1, 2),
    )
    flushed = torch.finfo(BF16).smallest_normal if dtype == BF16 and isa.dpbf16 else 0.0
    for row, delta in enumerate(deltas.view(3, 65).to(wide)):
        B[0, 0] = delta
        one = p.with_(y=p.y[row : row + 1], x=p.x[:1], B=B)
        expected = (one.y.float() + delta.float()).to(dtype)
        torch.testing.assert_close(run(one, isa), expected, rtol=0, atol=flushed, equal_nan=True)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_embedding(batch: str, dtype: torch.dtype) -> None:
    leading, slots, rows = BATCHES[batch]
    p = random_problem(
        x_shape=leading, slots=slots, rows=rows, sizes=(45,), vocabulary=19, dtypes=(dtype,) * 3
    )
    y = run(p)
    assert_delta(p, y)
    assert torch.equal(run(p.with_(x=p.x.int())), y)
    assert torch.equal(run(sharing_room(p, 2)), y)


@pytest.mark.parametrize("name", ["odd", "three slices"])
def test_rows_are_independent(name: str, threads: int) -> None:
    """A row's bits do not depend on the batch around it: its size, its mix, the threads."""
    p = problem(name, "many rows")
    rows, n = p.rows, p.slots.numel()
    together = run(p)
    for j in range(n):
        alone = torch.full_like(p.slots, -1)
        alone[j] = p.slots[j]
        assert torch.equal(run(p.with_(slots=alone))[j], together[j])
        alike = torch.full_like(p.slots, int(p.slots[j]))
        assert torch.equal(run(p.with_(slots=alike))[j], together[j])
    for j, t in itertools.product((0, 2, n - 1), (0, 7, rows - 1)):
        one = p.with_(y=p.y[j, t : t + 1], x=p.x[j, t : t + 1], slots=p.slots[j : j + 1], rows=1)
        assert torch.equal(run(one)[0], together[j, t])


def test_unproved_rows() -> None:
    p = problem("odd", "prefill").with_(rows=0, slots=torch.ones(4, dtype=torch.int32))
    assert_delta(p, run(p))
    with pytest.raises(RuntimeError, match="row ownership is not proved"):
        run(p.with_(slots=torch.tensor([1, -1], dtype=torch.int32)))


BAD = {
    "x does not have": lambda p: {"x": p.x[..., 1:]},
    "not a bank of": lambda p: {"A": p.A.transpose(1, 2).contiguous().transpose(1, 2)},
    "are not \\(slots, siblings\\)": lambda p: {"scales": p.scales[:, :1]},
    "a slot is outside the bank": lambda p: {"slots": p.slots + 2},
}


@pytest.mark.parametrize("message", list(BAD))
def test_bad_arguments(message: str) -> None:
    """Refused before y is touched, and no tensor is kept."""
    p = problem("odd", "prefill")
    kernel = build(p.spec)
    run(p)
    p = p.with_(**BAD[message](p))
    before, counts = p.y.clone(), _use_counts((p.y, p.x, *p.bank))
    with pytest.raises(RuntimeError, match=message):
        lora.run_delta_(p.y, p.x, *p.bank, p.rows, kernel)
    assert torch.equal(p.y, before)
    assert _use_counts((p.y, p.x, *p.bank)) == counts


def test_token_id_outside_the_table() -> None:
    p = random_problem(x_shape=(2, 3), slots=(0, 1), rows=3, sizes=(45,), vocabulary=19)
    for wrong in (19, -1):
        p.x[1, 1] = wrong
        with pytest.raises(RuntimeError, match="a token id is outside the embedding"):
            run(p)


def _use_counts(tensors: Sequence[torch.Tensor]) -> list[int]:
    return [tensor._use_count() for tensor in tensors]
