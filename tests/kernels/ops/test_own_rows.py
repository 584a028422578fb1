"""Rows of a weight that slots have of their own: linears and embeddings, in plain aten."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lorafx.errors import LoweringError
from lorafx.kernels.ops.own_rows import (
    KRONECKER,
    SCALED_PAIR,
    SHIFTED_OUTPUT,
    TURNED_INPUT,
    TURNED_OUTPUT,
    Structure,
)
from lorafx.model.bank import Bank, OwnWeight, SharedPair

S, V, K, N = 3, 7, 4, 6
SLOTS = torch.tensor([1, -1, 0, 2], dtype=torch.int32)


def bank(kind: str, rows: int) -> Bank:
    return Bank.allocate(
        kind=kind,
        slots=S,
        rank=1,
        in_features=V if kind == "embedding" else K,
        out_features=(N,),
        dtype=torch.float32,
        device=torch.device("cpu"),
        own_rows=rows,
        own_weights=S,
    )


def linear(b: Bank, x: Tensor, y: Tensor, rows: int = 2, weight: Tensor | None = None) -> Tensor:
    return torch.ops.lorafx.own_linear(x, y, *b.own_rows, SLOTS, rows, weight)


def embedding(b: Bank, ids: Tensor, y: Tensor) -> Tensor:
    return torch.ops.lorafx.own_embedding(ids, y, b.own, b.own_at, b.own_table, SLOTS, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    b = bank("linear", N)
    whole, bias, some = torch.randn(N, K), torch.randn(N), torch.randn(2, K)
    b.write(0, [], b.tables([]), OwnWeight(whole, bias))
    b.write(1, [], b.tables([]), OwnWeight(some, None, torch.tensor([3, 0], dtype=torch.int32)), 1)
    x, y = torch.randn(4, 2, K).to(dtype), torch.randn(4, 2, N).to(dtype)
    got, want = linear(b, x, y), y.clone()
    want[2] = torch.nn.functional.linear(x[2].float(), whole, bias).to(dtype)
    want[0][:, [3, 0]] = torch.nn.functional.linear(x[0].float(), some).to(dtype)
    assert torch.allclose(got, want, atol=1e-6)
    assert torch.equal(got[[1, 3]], y[[1, 3]])  # the base, and a slot without a weight of its own
    b.write(0, [], b.tables([]))
    b.write(1, [], b.tables([]), OwnWeight(some[:1], None, torch.tensor([2], dtype=torch.int32)), 1)
    want = y.clone()
    want[0][:, [2]] = torch.nn.functional.linear(x[0].float(), some[:1]).to(dtype)
    assert torch.allclose(linear(b, x, y), want, atol=1e-6)  # nothing is left of what was there


@pytest.mark.parametrize(
    "structure",
    [
        *(Structure(KRONECKER, *sizes) for sizes in ((1, 2), (3, 1), (3, 4))),
        *(Structure(TURNED_INPUT, block) for block in (1, 2, 4)),
        *(Structure(TURNED_OUTPUT, block) for block in (1, 2)),
        Structure(SHIFTED_OUTPUT, 1),
    ],
)
def test_a_structure_computes_as_its_weight(structure: Structure) -> None:
    torch.manual_seed(0)
    b, weight, bias = bank("linear", N), torch.randn(N, K), torch.randn(N)
    numbers = torch.randn(structure.numbers(N, K))
    b.write(0, [], b.tables([]), OwnWeight(numbers, structure=structure), 1)
    b.write(1, [], b.tables([]), OwnWeight(torch.randn(N, K)))
    x = torch.randn(4, 2, K)
    y = torch.nn.functional.linear(x, weight, bias)
    changed = structure.of_weight(numbers, weight)
    of_output = structure.form in (TURNED_OUTPUT, SHIFTED_OUTPUT)
    shifted = structure.of_weight(numbers, bias) if of_output else bias
    got, want = linear(b, x, y, weight=weight), y.clone()
    want[2] = torch.nn.functional.linear(x[2], changed, shifted)
    assert torch.allclose(got[1:], want[1:], atol=1e-5)
    assert not torch.allclose(got[0], want[0], atol=0.1)
    turned = torch.ops.lorafx.own_input(x, b.own, b.own_table, SLOTS, 2)
    assert torch.equal(turned[[0, 1, 3]], x[[0, 1, 3]])
    y = torch.nn.functional.linear(turned, weight, bias)
    got = torch.ops.lorafx.own_linear(x, y, *b.own_rows, SLOTS, 2, None, True)
    assert torch.allclose(got[1:], want[1:], atol=1e-5)


@pytest.mark.parametrize("form", [KRONECKER, TURNED_INPUT, TURNED_OUTPUT, SHIFTED_OUTPUT])
def test_slots_of_one_structure_are_computed_as_each_alone(form: int) -> None:
    b, weight = bank("linear", N), torch.randn(N, K)
    for slot, first in enumerate((1 if form == SHIFTED_OUTPUT else 2,) * 2 + (1,)):
        own = OwnWeight(torch.randn(14), structure=Structure(form, first, 2))
        b.write(slot, [], b.tables([]), own, slot)
    slots, x = torch.tensor([1, 0, -1, 1, 2, 0, 2, 2], dtype=torch.int32), torch.randn(8, 3, K)
    y = torch.nn.functional.linear(x, weight)
    got = torch.ops.lorafx.own_linear(x, y, *b.own_rows, slots, 3, weight)
    for one in slots.argsort().split(1):
        alone = torch.ops.lorafx.own_linear(x[one], y[one], *b.own_rows, slots[one], 3, weight)
        assert torch.allclose(got[one], alone, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scaled_pair(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    pair = SharedPair(torch.randn(3, K + 1), torch.randn(N + 2, 3))
    b = replace(bank("linear", N), **dict(zip(("pair_a", "pair_b"), pair.of(K, N), strict=True)))
    adapters = [torch.randn(3 + N) for _ in range(2)]
    for slot, numbers in enumerate(adapters):
        own = OwnWeight(numbers, structure=Structure(SCALED_PAIR, 3, 1))
        b.write(slot, [], b.tables([]), own, slot)
    x, y = torch.randn(4, 2, K).to(dtype), torch.randn(4, 2, N).to(dtype)
    got = linear(b, x, y)
    for row, (d, u) in ((2, adapters[0].split((3, N))), (0, adapters[1].split((3, N)))):
        inner = x[row].double() @ pair.A[:, :K].double().mT
        want = y[row] + (inner * d) @ pair.B[:N].double().mT * u
        assert (got[row] - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()
    assert torch.equal(got[[1, 3]], y[[1, 3]])
    arguments = x, y, *b.own_rows, SLOTS, 2
    torch.library.opcheck(torch.ops.lorafx.own_linear.default, arguments)
    with pytest.raises(LoweringError, match="no pair"):
        linear(replace(b, pair_a=None, pair_b=None), x, y)


def test_turned_inputs_need_the_weight() -> None:
    b = bank("linear", 1)
    b.write(2, [], b.tables([]), OwnWeight(torch.ones(K), structure=Structure(TURNED_INPUT, 1)))
    with pytest.raises(LoweringError, match="it needs the weight"):
        linear(b, torch.ones(4, 2, K), torch.ones(4, 2, N))


def test_an_embedding() -> None:
    torch.manual_seed(0)
    b = bank("embedding", V)
    whole, some = torch.randn(V, N), torch.randn(2, N)
    b.write(0, [], b.tables([]), OwnWeight(whole))
    b.write(1, [], b.tables([]), OwnWeight(some, None, torch.tensor([6, 2], dtype=torch.int32)), 1)
    ids, y = torch.tensor([[2, 3], [2, 6], [6, 0], [2, 2]]), torch.randn(4, 2, N)
    want = y.clone()
    want[0, 0], want[2] = some[1], whole[ids[2]]
    assert torch.equal(embedding(b, ids, y), want)
    b.write(0, [], b.tables([]))
    b.write(1, [], b.tables([]))
    assert torch.equal(embedding(b, ids, y), y)


def test_opcheck() -> None:
    b, e = bank("linear", 3), bank("embedding", 3)
    b.write(
        0,
        [],
        b.tables([]),
        OwnWeight(torch.randn(1, K), None, torch.tensor([1], dtype=torch.int32)),
    )
    x, y, ids = torch.randn(4, 2, K), torch.randn(4, 2, N), torch.randint(V, (4, 2))
    checks = ("test_schema", "test_faketensor")
    linear_op, embedding_op = torch.ops.lorafx.own_linear, torch.ops.lorafx.own_embedding
    torch.library.opcheck(linear_op, (x, y, *b.own_rows, SLOTS, 2), test_utils=checks)
    structure = Structure(KRONECKER, 2, 2)
    b.write(
        1, [], b.tables([]), OwnWeight(torch.randn(structure.numbers(N, K)), structure=structure), 1
    )
    arguments = (x, y, *b.own_rows, SLOTS, 2, torch.randn(N, K))
    torch.library.opcheck(linear_op, arguments, test_utils=checks)
    arguments = (x, b.own, b.own_table, SLOTS, 2)
    torch.library.opcheck(torch.ops.lorafx.own_input, arguments, test_utils=checks)
    arguments = (ids, y, e.own, e.own_at, e.own_table, SLOTS, 2)
    torch.library.opcheck(embedding_op, arguments, test_utils=checks)
