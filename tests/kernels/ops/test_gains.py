"""DoRA's scale of each output: what the ops with gains compute, and what they leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorafx.errors import ProvenanceError
from lorafx.kernels.ops.delta import rescaled

pytestmark = pytest.mark.quick

lora = torch.ops.lorafx
S, R, K, ROWS = 3, 2, 5, 2
SIZES, OFFSETS = [4, 3], [1, 5]
N, COLUMNS = sum(SIZES), 9
SLOTS = torch.tensor([2, -1, 0, 1], dtype=torch.int32)


def bank(siblings: int = 2) -> tuple[Tensor, ...]:
    A = torch.randn(S, R, siblings * K)
    ranks = torch.full((S, siblings), R, dtype=torch.int32)
    return A, torch.randn(S, R, COLUMNS), ranks, torch.rand(S, siblings), SLOTS


def gains() -> Tensor:
    found = torch.randn(S, COLUMNS)
    found[1] = 0  # a plain adapter
    found[0, 6] = 0  # an output that keeps its scale
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_each_row_is_rescaled_by_its_own_slot(bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    y, g = torch.randn(4, ROWS, N).to(dtype), gains()
    c = torch.randn(N).to(dtype) if bias else None
    got = rescaled(y, g, c, SLOTS, ROWS, OFFSETS, SIZES)
    own = torch.cat([g[:, 1:5], g[:, 5:8]], 1).double()
    zero = torch.zeros(N) if c is None else c
    for row, slot in enumerate(SLOTS.tolist()):
        if slot < 0:
            assert torch.equal(got[row], y[row])
            continue
        want = zero.double() + (1 + own[slot]) * (y[row].double() - zero.double())
        tolerance = 1e-2 if dtype.itemsize == 2 else 1e-6
        torch.testing.assert_close(got[row].double(), want, atol=tolerance, rtol=tolerance)
        assert torch.equal(got[row][:, own[slot] == 0], y[row][:, own[slot] == 0])


def test_what_keeps_its_scale_keeps_its_bits() -> None:
    """Also where arithmetic with a gain of zero would not: ∞, NaN and −0."""
    odd = torch.tensor([float("inf"), float("nan"), -0.0, 1.0, -1.0, 2.0, 3.0])
    y = odd.expand(4, ROWS, N)
    got = rescaled(y, torch.zeros(S, COLUMNS), torch.ones(N), SLOTS, ROWS, OFFSETS, SIZES)
    assert torch.equal(got.view(torch.int32), y.contiguous().view(torch.int32))


def test_a_site_with_gains_rescales_its_sum() -> None:
    torch.manual_seed(1)
    x, y, g, c = torch.randn(4, ROWS, K), torch.randn(4, ROWS, N), gains(), torch.randn(N)
    ranges = ([0, 1], OFFSETS, SIZES)
    parts = bank()
    plain = lora.site(x, y, *parts, *ranges, ROWS)
    got = lora.site(x, y, *parts, *ranges, ROWS, None, None, g, c)
    assert torch.equal(got, rescaled(plain, g, c, SLOTS, ROWS, OFFSETS, SIZES))
    assert torch.equal(got[1], y[1])
    assert not torch.equal(got[0], plain[0])


def test_unproved_rows_are_refused_where_slots_differ() -> None:
    y = torch.randn(4, ROWS, N)
    with pytest.raises(ProvenanceError, match="row ownership is not proved"):
        rescaled(y, gains(), None, SLOTS, 0, OFFSETS, SIZES)


def test_opcheck() -> None:
    torch.manual_seed(2)
    x, y = torch.randn(4, ROWS, K), torch.randn(4, ROWS, N)
    linear = (x, y, *bank(), [0, 1], OFFSETS, SIZES, ROWS, None, None, gains(), torch.randn(N))
    torch.library.opcheck(lora.site.default, linear)
    _, B, ranks, scales, slots = bank(1)
    ids, rows = torch.randint(0, 7, (4, ROWS)), torch.randn(4, ROWS, COLUMNS)
    embedding = (ids, rows, torch.randn(S, 7, R), B, ranks, scales, slots, ROWS, gains())
    torch.library.opcheck(lora.embedding_site.default, embedding)
