"""`lorafx::grouped_site` against the dense product in float64; schema and fake by opcheck."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from lorafx.errors import LoweringError, ProvenanceError
from lorafx.kernels.ops.grouped_ops import Blocks, add_grouped_delta
from lorafx.kernels.ops.op_library import BankArgs, Ranges

pytestmark = pytest.mark.quick

SLOTS, R, K = 3, 4, 10
SIZES = (8, 4)  # of the site's parts: N = 12
N = sum(SIZES)

#: How W (12, 10) is cut: by name (G, out steps, in steps, rows of a block, columns of a block).
CUTS = {
    "whole": (1, (0, 0, 1), (0, 0, 1), N, K),
    "rows by group": (3, (0, 4, 1), (0, 0, 1), 4, K),
    "the first rows of each group": (2, (0, 6, 1), (0, 0, 1), 4, K),
    "the last rows of each group": (2, (4, 6, 1), (0, 0, 1), 2, K),
    "interleaved groups": (3, (0, 1, 3), (0, 0, 1), 4, K),
    "every other row": (1, (1, 0, 2), (0, 0, 1), 6, K),
    "columns by group": (2, (0, 0, 1), (0, 5, 1), N, 5),
    "a corner": (1, (3, 0, 1), (2, 0, 2), 7, 4),
}


def blocks_of(weight: Tensor, cut: str) -> Tensor:
    """(G, J, C) of W (N, K)."""
    groups, out, into, rows, columns = CUTS[cut]
    g = torch.arange(groups)[:, None]
    j = out[0] + g * out[1] + torch.arange(rows) * out[2]
    c = into[0] + g * into[1] + torch.arange(columns) * into[2]
    return weight[j[:, :, None], c[:, None, :]]


def bank(parts: tuple[int, ...] = (N,), dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    ranks = torch.tensor([[(s + i) % (R + 1) for i in range(len(parts))] for s in (1, 4, 2)])
    A = torch.randn(SLOTS, R, len(parts) * K, dtype=dtype)
    B = torch.randn(SLOTS, R, N, dtype=dtype)
    return A, B, ranks.to(torch.int32), torch.rand(SLOTS, len(parts)) + 0.5


def delta_w(bank: tuple[Tensor, ...], parts: tuple[int, ...], slot: int) -> Tensor:
    """ΔW (N, K) of a slot, float64."""
    A, B, ranks, scales = bank
    full, start = torch.zeros(N, K, dtype=torch.float64), 0
    for i, size in enumerate(parts):
        r = int(ranks[slot, i])
        a = A[slot, :r, i * K : (i + 1) * K].double()
        b = B[slot, :r, start : start + size].double()
        full[start : start + size] = float(scales[slot, i]) * b.T @ a
        start += size
    return full


def arguments(
    cut: str, *, over_out: bool, parts: tuple[int, ...], lead: str, dtype: torch.dtype
) -> tuple:
    """Everything that `grouped_site` takes, for four requests of three tokens."""
    groups, out, into, rows, columns = CUTS[cut]
    features, results = (rows, columns) if over_out else (columns, rows)
    requests, tokens = 4, 3
    shapes = {
        "groups first": ((groups, requests * tokens), 0, tokens),
        "requests first": ((requests, groups, tokens), 1, groups * tokens),
        "requests and groups as one": ((requests * groups, tokens), 0, groups * tokens),
        "groups last": ((requests * tokens, groups), 1, tokens * groups),
    }
    leading, dim, period = shapes[lead]
    x = torch.randn(*leading, features).to(dtype)
    y = torch.randn(*leading, results).to(dtype)
    slots = torch.tensor([1, -1, 0, 2], dtype=torch.int32)
    offsets = [sum(parts[:i]) for i in range(len(parts))]
    ranges = (list(range(len(parts))), offsets, list(parts))
    cut_as = (groups, list(out), list(into), over_out)
    return (x, y, *bank(parts), slots, *ranges, period, dim, *cut_as)


def expected(args: tuple, cut: str, parts: tuple[int, ...], over_out: bool) -> Tensor:
    x, y, A, B, ranks, scales, slots, *_, period, dim, groups, _, _, _ = args
    want = y.double().clone()
    flat = torch.arange(x.shape[:-1].numel()).view(x.shape[:-1])
    for place in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:-1])).view(
        -1, x.dim() - 1
    ):
        at = tuple(place.tolist())
        slot = int(slots[(int(flat[at]) // period) % len(slots)])
        if slot >= 0:
            full = delta_w((A, B, ranks, scales), parts, slot)
            block = blocks_of(full, cut)[at[dim] % groups]
            want[at] += x[at].double() @ (block if over_out else block.T)
    return want


LEADS = ("groups first", "requests first", "requests and groups as one", "groups last")


@pytest.mark.parametrize("over_out", [False, True], ids=["over in", "over out"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("lead", LEADS)
def test_every_cut_in_every_layout(cut: str, lead: str, over_out: bool) -> None:
    for parts in ((N,), SIZES):
        args = arguments(cut, over_out=over_out, parts=parts, lead=lead, dtype=torch.float32)
        want = expected(args, cut, parts, over_out)
        before = args[1].clone()
        got = torch.ops.lorafx.grouped_site(*args)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        assert torch.equal(args[1], before)
        masked = args[1].clone()
        blocks = Blocks(args[12], tuple(args[13]), tuple(args[14]), over_out)
        bank_and_ranges = BankArgs(*args[2:7]), Ranges(*args[7:10])
        add_grouped_delta(masked, args[0], *bank_and_ranges, *args[10:12], blocks, by_slot=False)
        torch.testing.assert_close(masked.double(), want, rtol=1e-5, atol=1e-5)


def test_unproved_rows_and_misfits_are_told() -> None:
    args = arguments("whole", over_out=False, parts=(N,), lead=LEADS[0], dtype=torch.float32)
    with pytest.raises(ProvenanceError, match="row ownership is not proved"):
        torch.ops.lorafx.grouped_site(*args[:10], 0, *args[11:])
    with pytest.raises(LoweringError, match="reach out index 12 of 12"):
        torch.ops.lorafx.grouped_site(*args[:13], [1, 0, 1], *args[14:])


@pytest.mark.parametrize("over_out", [False, True], ids=["over in", "over out"])
def test_opcheck(over_out: bool) -> None:
    settings = {"parts": SIZES, "lead": LEADS[1], "dtype": torch.float32}
    args = arguments("the first rows of each group", over_out=over_out, **settings)
    result = opcheck(torch.ops.lorafx.grouped_site, args)
    assert set(result.values()) == {"SUCCESS"}
