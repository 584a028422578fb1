"""Exact division and reshaping of symbolic sizes; one symbol for the batch."""

from __future__ import annotations

import pytest
import sympy
from torch.utils._sympy.functions import FloorDiv

from lorafx.errors import ProvenanceError
from lorafx.ownership.symbolic import (
    BatchSymbols,
    Sizes,
    divide,
    reshaped,
)

pytestmark = pytest.mark.quick

B, T, K, C = (sympy.Symbol(name, positive=True, integer=True) for name in "BTKC")


def n(*sizes: object) -> tuple[sympy.Expr, ...]:
    return tuple(sympy.sympify(size) for size in sizes)


@pytest.mark.parametrize(
    ("a", "b", "quotient"),
    [
        (6 * B * T, 2 * B, 3 * T),
        (B**2 * T, B, B * T),
        (B * T, T, B),
        (B * T + B, B, T + 1),
        (FloorDiv(B * T * 64, 64), T, B),
        (2 * T, 4, None),
        (T, B, None),
        (B + 1, B, None),
        (B * FloorDiv(T, 2), FloorDiv(T, 2), B),
    ],
)
def test_divide_cancels_or_gives_up(a, b, quotient):
    assert divide(sympy.sympify(a), sympy.sympify(b)) == quotient


@pytest.mark.parametrize(
    ("dim", "rows", "old", "new", "where"),
    [
        (0, 1, (B, T, K), (B * T, K), (0, T)),  # flattened, batch first
        (1, 1, (T, B, K), (T * B, K), (0, 1)),  # flattened, sequence first
        (0, T, (B * T, K), (B, T, K), (0, 1)),
        (0, 1, (T * B, K), (T, B, K), (1, 1)),
        (0, 1, (B, K), (B, 2, C), (0, 1)),
        (0, 4, (B * 4, T, K), (B, 4, T, K), (0, 1)),
        (0, 4, (B * 4, T, K), (B, 2, 2, T, K), (0, 1)),
        (0, 4, (B * 4, T, K), (B * 2, 2 * T, K), (0, 2)),
        (0, T, (B * T, K), (T, B, K), None),  # the misleading view: sizes fit, owners do not
        (0, 1, (B, T, K), (T, B, K), None),
        (1, 1, (T, B, K), (B, T, K), None),
        (0, 1, (B, T), (C, K), None),
    ],
)
def test_reshaped(dim, rows, old, new, where):
    found = reshaped(dim, sympy.sympify(rows), B, n(*old), n(*new))
    assert found == (None if where is None else (where[0], sympy.sympify(where[1])))


def test_reshaped_table_rows_must_stay_whole():
    assert reshaped(0, T, B, n(B * T, K), n(B * T, 2, C), fixed=True) == (0, T)
    assert reshaped(0, T, B, n(B * T, K), n(B, T, K), fixed=True) is None


def test_batch_symbols_become_one():
    batch = BatchSymbols.of([B, T])
    sizes = Sizes(batch)
    assert sizes.unify(T * K) == batch.canonical * K
    assert BatchSymbols.of([B, 4]).canonical == 4
    assert BatchSymbols.of([1]).is_one
    assert not BatchSymbols.of([B]).is_one


@pytest.mark.parametrize("sizes", [[], [3, 4], [2 * B]])
def test_batch_symbols_refuse_what_is_not_one_number_of_requests(sizes):
    with pytest.raises(ProvenanceError, match="number of requests"):
        BatchSymbols.of(sizes)


def test_a_size_is_learnt_from_the_product_with_the_requests() -> None:
    requests, heads, length = sympy.symbols("B H L", integer=True, positive=True)
    sizes = Sizes(BatchSymbols.of([requests]))
    sizes.learn(requests * heads, 4 * requests)
    assert sizes.unify(heads) == 4
    sizes.learn(heads * length, heads * 7)  # there may be no heads
    assert sizes.unify(length) == length
