"""Ops for routed experts. A bank for E experts has E·S slots (lorafx.model.bank). Row m, of a
request in slot s and routed to expert e, is a row of slot

    key[m] = e·S + s    where 0 ≤ s < S and 0 ≤ e < E,    else -1

so the delta of an expert's product is `add_delta_` with a key for each row:

    y[m] += scales[key] · (x[m] A[key]ᵀ) B[key]

    expert_mark         a hook's op in a trace, by which `match` knows that the experts ran
    expert_site         y + delta, which `match` puts behind the base's product
    expert_slots        the keys, which `lower` computes for `add_delta_`, and
    run_expert_delta_   the delta by a generated CPU kernel that finds the keys itself
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafx.errors import BatchError
from lorafx.kernels.ops.delta import add_linear_delta, row_slots
from lorafx.kernels.ops.linear_ops import ranges_of
from lorafx.kernels.ops.op_checks import check_bank, check_linear, check_rows, require
from lorafx.kernels.ops.op_library import BANK, RANGES, BankArgs, Ranges, define


def expert_slots(slots: Tensor, experts: Tensor, rows: int, count: int, capacity: int) -> Tensor:
    """The key of each row, int32 (M,), for E `count` and S `capacity`. `experts`, integers (M,),
    outside 0 … count − 1 stand for no expert. BatchError where a slot is not below S."""
    owner = row_slots(slots, rows, experts.shape[0])
    if owner.device.type == "cpu" and bool((owner >= capacity).any()):
        raise BatchError(f"slot {int(owner.max())} in a batch, but the bank has {capacity} slots")
    routed = (owner >= 0) & (owner < capacity) & (experts >= 0) & (experts < count)
    return torch.where(routed, experts * capacity + owner, -1).to(torch.int32)


def expert_slots_fake(slots, experts, rows, count, capacity):
    return slots.new_empty(experts.shape)


def _add_delta(
    y: Tensor, x: Tensor, bank: BankArgs, experts: Tensor, ranges: Ranges, rows: int, count: int
) -> None:
    keys = expert_slots(bank.slots, experts, rows, count, bank.ranks.shape[0] // count)
    add_linear_delta(y, x, bank._replace(slots=keys), ranges, 1)


def expert_mark(y: Tensor, A: Tensor) -> Tensor:
    """A copy of y, the result of a module of experts with the bank of A; `match` removes the op."""
    return y.clone()


def expert_mark_fake(y, A):
    return torch.empty_like(y)


def expert_site(
    x: Tensor, y: Tensor, bank: BankArgs, experts: Tensor, ranges: Ranges, rows: int, count: int
) -> Tensor:
    """y (M, N) + delta for x (M, K), row m of expert experts[m]; a new contiguous tensor."""
    _check_site(x, y, bank, experts, ranges, rows, count)
    out = y.clone(memory_format=torch.contiguous_format)
    _add_delta(out, x, bank, experts, ranges, rows, count)
    return out


def expert_site_fake(x, y, bank: BankArgs, experts, ranges: Ranges, rows, count):
    _check_site(x, y, bank, experts, ranges, rows, count)
    return y.new_empty(y.shape)


def _check_site(x, y, bank, experts, ranges, rows, count) -> None:
    op, S = "expert_site", bank.ranks.shape[0]
    check_linear(op, x, y.shape[-1], bank, ranges)
    check_rows(op, x.shape[:-1], y.shape[:-1], rows)
    require(op, count > 0 and S % count == 0, f"{count} experts do not divide S")
    require(op, experts.dim() == 1, f"experts is (rows,), not {tuple(experts.shape)}")
    check_rows(op, x.shape[:-1], experts.shape, rows)


def run_expert_delta_(
    y: Tensor,
    x: Tensor,
    bank: BankArgs,
    alike: Tensor,
    experts: Tensor,
    rows: int,
    count: int,
    ends: bool,
    kernel: int,
) -> None:
    """Adds the delta of `expert_site` for the column ranges of `kernel` into y (M, N) in place.

    `alike`, int32 (E·S, G), is the bank's. `experts` are integers: the expert of each row (M,), or
    with `ends` where the rows of each expert end (E,), rows being sorted; rows behind have none.
    """
    ranges = ranges_of("run_expert_delta_", kernel)
    if ends:
        numbers = torch.arange(x.shape[0], device=experts.device, dtype=experts.dtype)
        experts = torch.searchsorted(experts, numbers, right=True)
    _check_site(x, y, bank, experts, ranges, rows, count)
    _add_delta(y, x, bank, experts, ranges, rows, count)


def run_expert_delta_fake(y, x, bank: BankArgs, alike, experts, rows, count, ends, kernel) -> None:
    op, S = "run_expert_delta_", bank.ranks.shape[0]
    check_bank(op, bank)
    check_rows(op, x.shape[:-1], y.shape[:-1], rows)
    require(op, alike.dim() == 2 and alike.shape[0] == S, "alike is (S, siblings)")
    require(op, experts.dim() == 1, f"experts is a vector, not {tuple(experts.shape)}")


for _schema, _eager, _fake in (
    (
        "expert_slots(Tensor slots, Tensor experts, SymInt rows, int count, int capacity)"
        " -> Tensor",
        *(expert_slots, expert_slots_fake),
    ),
    ("expert_mark(Tensor y, Tensor A) -> Tensor", expert_mark, expert_mark_fake),
    (
        f"expert_site(Tensor x, Tensor y, {BANK}, Tensor experts, {RANGES}, SymInt rows,"
        " int count) -> Tensor",
        *(expert_site, expert_site_fake),
    ),
    (
        f"run_expert_delta_(Tensor(a!) y, Tensor x, {BANK}, Tensor alike, Tensor experts,"
        " SymInt rows, int count, bool ends, int kernel) -> ()",
        *(run_expert_delta_, run_expert_delta_fake),
    ),
):
    define(_schema, _eager, _fake)
