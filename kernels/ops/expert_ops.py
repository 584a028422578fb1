"""Ops for routed experts: `expert_site`, `run_expert_delta_`, `expert_slots` and `expert_mark`.

A bank for E experts has E·S slots (lorafx.model.bank). Row m, of a request in slot s and
routed to expert e, is a row of slot

    key[m] = e·S + s    where 0 ≤ s < S and 0 ≤ e < E,    else -1

so the delta of an expert's product is `add_delta_` with one key a row, whatever computes it:

    y[m] += scales[key] · (x[m] A[key]ᵀ) B[key]

`expert_site` is the op that `match` puts behind the base's product. `lower` makes it a
`run_expert_delta_`, whose generated CPU kernel finds the keys itself, or takes it apart into
`expert_slots` and the delta. `expert_mark` is what a hook leaves in a trace, so that `match` knows
that the experts ran.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafx.errors import BatchError
from lorafx.kernels.ops.bank_arguments import BANK, RANGES, BankArgs, Ranges
from lorafx.kernels.ops.delta import add_linear_delta, row_slots
from lorafx.kernels.ops.op_checks import check_bank, check_linear, check_rows, require
from lorafx.kernels.ops.op_library import define
from lorafx.kernels.ops.ops import ranges_of

SCHEMAS = (
    "expert_slots(Tensor slots, Tensor experts, SymInt rows, int count, int capacity) -> Tensor",
    "expert_mark(Tensor y, Tensor A) -> Tensor",
    f"expert_site(Tensor x, Tensor y, {BANK}, Tensor experts, {RANGES}, SymInt rows, int count)"
    " -> Tensor",
    f"run_expert_delta_(Tensor(a!) y, Tensor x, {BANK}, Tensor alike, Tensor experts, SymInt rows,"
    " int count, bool ends, int kernel) -> ()",
)


def expert_slots(slots: Tensor, experts: Tensor, rows: int, count: int, capacity: int) -> Tensor:
    """The key of each row, int32 (M,).

    Args:
        slots: int32 (n,), row m belongs to slots[(m // rows) % n]; -1 for a base row.
        experts: integers (M,), the expert that each row was routed to; others than 0 … count - 1
            stand for none.
        rows: as for the other ops.
        count: E.
        capacity: S.

    Raises:
        ProvenanceError, BatchError: as `row_slots`; a slot is not below S.
    """
    owner = row_slots(slots, rows, experts.shape[0])
    if owner.device.type == "cpu" and bool((owner >= capacity).any()):
        raise BatchError(f"slot {int(owner.max())} in a batch, but the bank has {capacity} slots")
    routed = (owner >= 0) & (owner < capacity) & (experts >= 0) & (experts < count)
    return torch.where(routed, experts * capacity + owner, -1).to(torch.int32)


def expert_slots_fake(slots, experts, rows, count, capacity):
    return slots.new_empty(experts.shape)


def expert_mark(y: Tensor, A: Tensor) -> Tensor:
    """A copy of y, what a module of experts with the bank of A returned: `match` takes it away."""
    return y.clone()


def expert_mark_fake(y, A):
    return torch.empty_like(y)


def expert_site(
    x: Tensor,
    y: Tensor,
    bank: BankArgs,
    experts: Tensor,
    ranges: Ranges,
    rows: int,
    count: int,
) -> Tensor:
    """y (M, N) + delta for x (M, K), row m being expert experts[m]'s; a new contiguous tensor.

    A (E·S, R, G·K), B (E·S, R, ΣN), ranks and scales (E·S, G), E = `count`; the rest is as in
    `site`.
    """
    _check(x, y, bank, experts, ranges, rows, count)
    keys = expert_slots(bank.slots, experts, rows, count, bank.ranks.shape[0] // count)
    out = y.clone(memory_format=torch.contiguous_format)
    add_linear_delta(out, x, bank._replace(slots=keys), ranges, 1)
    return out


def expert_site_fake(x, y, bank: BankArgs, experts, ranges: Ranges, rows, count):
    _check(x, y, bank, experts, ranges, rows, count)
    return y.new_empty(y.shape)


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
    """The delta of `expert_site` for the column ranges of `kernel`, added into y (M, N) in place.

    This is what runs off the CPU; on it, the generated code does, from dispatcher.cpp.

    Args:
        alike: int32 (E·S, G), the first sibling whose A, rank and scale are the same: what is
            known of the bank, so that no A is read twice (lorafx.model.bank).
        experts: integers, the expert of each row (M,), or with `ends` where the rows of each
            expert end (E,), rows being sorted by expert; rows behind the last have none.
    """
    ranges = ranges_of("run_expert_delta_", kernel)
    if ends:
        numbers = torch.arange(x.shape[0], device=experts.device, dtype=experts.dtype)
        experts = torch.searchsorted(experts, numbers, right=True)
    _check(x, y, bank, experts, ranges, rows, count)
    keys = expert_slots(bank.slots, experts, rows, count, bank.ranks.shape[0] // count)
    add_linear_delta(y, x, bank._replace(slots=keys), ranges, 1)


def run_expert_delta_fake(y, x, bank: BankArgs, alike, experts, rows, count, ends, kernel) -> None:
    op, S = "run_expert_delta_", bank.ranks.shape[0]
    check_bank(op, bank)
    check_rows(op, x.shape[:-1], y.shape[:-1], rows)
    require(op, alike.dim() == 2 and alike.shape[0] == S, "alike is (S, siblings)")
    require(op, experts.dim() == 1, f"experts is a vector, not {tuple(experts.shape)}")


def _check(x, y, bank, experts, ranges, rows, count) -> None:
    op, S = "expert_site", bank.ranks.shape[0]
    check_linear(op, x, y.shape[-1], bank, ranges)
    check_rows(op, x.shape[:-1], y.shape[:-1], rows)
    require(op, count > 0 and S % count == 0, f"{count} experts do not divide S")
    require(op, experts.dim() == 1, f"experts is (rows,), not {tuple(experts.shape)}")
    check_rows(op, x.shape[:-1], experts.shape, rows)


for _schema, _eager, _fake in (
    (SCHEMAS[0], expert_slots, expert_slots_fake),
    (SCHEMAS[1], expert_mark, expert_mark_fake),
    (SCHEMAS[2], expert_site, expert_site_fake),
    (SCHEMAS[3], run_expert_delta_, run_expert_delta_fake),
):
    define(_schema, _eager, _fake)
