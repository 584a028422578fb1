"""The ops: schemas and fakes by opcheck, aten arithmetic against float64, messages."""

from __future__ import annotations

import functools

import pytest
import torch
from delta_oracle import Problem, assert_delta, dense_delta, random_problem
from torch import Tensor
from torch.library import opcheck

import lorafx.kernels.ops.linear_ops  # noqa: F401  registers them
from lorafx.errors import BatchError, LoweringError, ProvenanceError
from lorafx.kernels.cpu.delta_kernels import build
from lorafx.kernels.ops.delta import add_embedding_delta, add_linear_delta

pytestmark = pytest.mark.quick

lora = torch.ops.lorafx
MIX = (2, -1, 0, 1)


def linear(**changes: object) -> Problem:
    return random_problem(**{"x_shape": (4, 3, 7), "slots": MIX, "rows": 3, **changes})


def embedding(**changes: object) -> Problem:
    defaults = {"x_shape": (4, 3), "slots": MIX, "rows": 3, "sizes": (9,), "vocabulary": 11}
    return random_problem(**{**defaults, **changes})


def live(problem: Problem) -> Problem:
    """The NaN planes zeroed: opcheck compares whole arguments."""
    return problem.with_(A=problem.A.nan_to_num(), B=problem.B.nan_to_num())


CASES = (
    *("site of several parts", "site with weight", "embedding_site", "fused_linear"),
    *("fused_linear, x W", "add_delta_", "run_delta_", "add_embedding_delta_"),
    "run_embedding_delta_",
)


@functools.cache
def cases() -> dict[str, tuple[object, tuple[object, ...]]]:
    p, e = live(linear()), live(embedding())
    weight, bias = torch.randn(sum(p.sizes), 7), torch.randn(sum(p.sizes))
    y = p.y[..., p.offsets[1] :]
    second = ([1], [p.offsets[1]], [y.shape[-1]])
    kernel = build(p.spec)
    table = build(e.spec)
    return {
        "site of several parts": (lora.site, (p.x, p.y, *p.bank, *p.ranges, p.rows)),
        "site with weight": (lora.site, (p.x, y, *p.bank, *second, 3, weight, bias)),
        "embedding_site": (lora.embedding_site, (e.x, e.y, *e.bank, e.rows)),
        "fused_linear": (lora.fused_linear, (p.x, weight, bias, *p.bank, *p.ranges, 3, False)),
        "fused_linear, x W": (
            lora.fused_linear,
            (p.x, weight.T.contiguous(), None, *p.bank, *p.ranges, 3, True),
        ),
        "add_delta_": (lora.add_delta_, (p.y, p.x, *p.bank, *p.ranges, 3)),
        "add_embedding_delta_": (lora.add_embedding_delta_, (e.y, e.x, *e.bank, 3)),
        "run_delta_": (lora.run_delta_, (p.y, p.x, *p.bank, 3, kernel)),
        "run_embedding_delta_": (lora.run_embedding_delta_, (e.y, e.x, *e.bank, 3, table)),
    }


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str) -> None:
    op, arguments = cases()[name]
    assert set(opcheck(op, arguments).values()) == {"SUCCESS"}


DTYPES = {
    "fp64": (torch.float64,) * 3,
    "fp32": (torch.float32,) * 3,
    "bf16": (torch.bfloat16,) * 3,
    "fp16": (torch.float16,) * 3,
    "bf16 bank": (torch.float32, torch.bfloat16, torch.float32),
}


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("grouped", [True, False])
def test_aten(dtypes: tuple[torch.dtype, ...], grouped: bool) -> None:
    p = linear(dtypes=dtypes, x_shape=(12, 7), sizes=(13, 17, 4), siblings=(2, 0))
    y = p.y.clone()
    add_linear_delta(y, p.x, p.bank, p.ranges, p.rows, grouped=grouped)
    assert_delta(p, y)
    e = embedding(dtypes=dtypes, x_shape=(12,))
    y = e.y.clone()
    add_embedding_delta(y, e.x, e.bank, e.rows, grouped=grouped)
    assert_delta(e, y)


def test_site_leaves_y_alone_and_reads_its_own_columns() -> None:
    p = linear(sizes=(13, 17, 4), siblings=(1,))
    before = p.y.clone()
    out = lora.site(p.x, p.y, *p.bank, [1], [13], [17], p.rows)
    assert_delta(p, out)
    assert torch.equal(p.y, before)
    assert torch.equal(out[1], before[1])  # the base row, bit for bit


def test_fused_linear_is_linear_and_delta() -> None:
    p = linear()
    weight, bias = torch.randn(30, 7, dtype=torch.float64), torch.randn(30)
    base = torch.nn.functional.linear(p.x.double(), weight, bias.double())
    expected = dense_delta(p.with_(y=base))[0].reshape(base.shape)
    for argument, swapped in ((weight, False), (weight.T, True)):
        out = lora.fused_linear(p.x, argument.float(), bias, *p.bank, *p.ranges, 3, swapped)
        torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-5)


def test_rows_not_traced_to_requests() -> None:
    """rows = 0: fine while all slots agree, an error once they differ."""
    alike = linear(rows=0, slots=(1, 1))
    y = alike.y.clone()
    lora.add_delta_(y, alike.x, *alike.bank, *alike.ranges, 0)
    assert_delta(alike, y)
    mixed = linear(rows=0, slots=(1, -1))
    with pytest.raises(ProvenanceError, match="row ownership is not proved"):
        lora.site(mixed.x, mixed.y[..., :13], *mixed.bank, [0], [0], [13], 0)


BAD = {
    "x has 6 features, A was made for 7": lambda p: {"x": p.x[..., :6]},
    "x has 12 rows and y has 9": lambda p: {"y": p.y[:3]},
    "A is torch.float32 and B torch.bfloat16": lambda p: {"B": p.B.bfloat16()},
    "slots is int32": lambda p: {"slots": p.slots.long()},
    r"sizes \[13, 16\] do not fill y's 30 columns": lambda p: {"sizes": [13, 16]},
    r"columns \[14, 31\) of a bank of 30 columns": lambda p: {"offsets": [0, 14]},
}


@pytest.mark.parametrize("message", list(BAD))
@pytest.mark.parametrize("fake", [False, True])
def test_bad_arguments_are_named(message: str, fake: bool) -> None:
    p = linear()
    p = p.with_(**BAD[message](p))
    arguments = (p.y, p.x, *p.bank, *p.ranges, p.rows)
    if fake:
        arguments = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in arguments)
    with pytest.raises(LoweringError, match=message):
        lora.add_delta_(*arguments)


def test_slot_beyond_the_bank() -> None:
    p = linear(slots=(0, 1, 2, 4))
    with pytest.raises(BatchError, match="slot 4 in a batch, but the bank has 4 slots"):
        lora.add_delta_(p.y, p.x, *p.bank, *p.ranges, 3)
    with pytest.raises(BatchError, match="12 rows but an empty slots tensor"):
        lora.add_delta_(p.y, p.x, *p.bank[:4], p.slots[:0], *p.ranges, 3)
