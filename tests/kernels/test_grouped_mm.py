"""`lorafx::grouped_mm` against one product a row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lorafx.kernels.grouped_mm  # noqa: F401  defines the op
from lorafx.errors import LoweringError

K, N = 5, 3
op = torch.ops.lorafx.grouped_mm


def operands(counts: list[int], rows: int, dtype: torch.dtype, swapped: bool) -> list[Tensor]:
    weight = torch.randn(len(counts), N, K).transpose(1, 2) if swapped else None
    if weight is None:
        weight = torch.randn(len(counts), K, N)
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    return [torch.randn(rows, K).to(dtype), weight.to(dtype), ends]


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    behind=st.integers(0, 2),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    swapped=st.booleans(),
)
def test_each_row_by_its_expert(counts, behind, dtype, swapped):
    torch.manual_seed(0)
    x, weight, ends = operands(counts, sum(counts) + behind, dtype, swapped)
    experts = [expert for expert, count in enumerate(counts) for _ in range(count)]
    want, size = torch.zeros(2, len(x), N, dtype=torch.float64)
    for row, expert in enumerate(experts):
        want[row] = x[row].double() @ weight[expert].double()
        size[row] = x[row].double().abs() @ weight[expert].double().abs()
    got = op(x, weight, ends)
    assert got.dtype == dtype
    # Rounding of K products, their sums and the result (Higham, Accuracy and Stability, 3.5).
    bound = (K + 2) * torch.finfo(dtype).eps * size
    assert bool(((got.double() - want).abs() <= bound).all())


def test_opcheck():
    arguments = operands([2, 0, 3], 6, torch.float32, swapped=True)
    assert set(torch.library.opcheck(op.default, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, o: (x[:, :-1], w, o), "4 columns of 5"),
        (lambda x, w, o: (x, w[0], o), "weight \\(E, K, N\\)"),
        (lambda x, w, o: (x, w, o[:-1]), r"offs is \(E,\), not \(2,\)"),
        (lambda x, w, o: (x.double(), w, o), "weight torch.float32"),
        (lambda x, w, o: (x[:-2], w, o), "offs ends at 5, of 4 rows"),
        (lambda x, w, o: (x, w, o.flip(0)), "offs ends at 2, of 6 rows"),
    ],
)
def test_bad_operands(change, message):
    with pytest.raises(LoweringError, match=message):
        op(*change(*operands([2, 0, 3], 6, torch.float32, swapped=False)))
