"""The ops of linears, embeddings and routed experts: schemas, fakes, eager references.

Importing this module registers them. Arguments:

    slots   int32 (n,), -1 for a base row; rows m of x are counted over all its dimensions but the
            last (an embedding's over all dimensions of ids)
    rows    > 0: row m belongs to slots[(m // rows) % n]; 0: unproved, then all slots must be equal
    A, B    the bank of one group (lorafx.model.bank): A (S, R, G·K), B (S, R, ΣN);
            embedding: A (S, V, R). Only the first ranks[s, i] of the R factors are read.
    gains   DoRA's G (S, ΣN) float32, for banks that have it (lorafx.kernels.ops.delta)
    shifts  the biases of slots (S, ΣN) float32, for banks with room for them
    own...  rows of the weight that slots replace, for banks with room for them
            (lorafx.kernels.ops.own_rows)

    site                  y + the deltas of one module, which its mark calls
    embedding_site        the same for an embedding
    fused_linear          base linear and the deltas of a pack, which `fuse` makes
    add_delta_            the delta alone, into y in place, which `lower` calls after the base GEMM
    add_embedding_delta_  the same for an embedding
    run_delta_            add_delta_ by a generated kernel, whose id stands for the column ranges
    run_embedding_delta_  the same for an embedding

A bank for E experts has E·S slots (lorafx.model.bank). Row m, of a request in slot s and routed to
expert e, is a row of slot

    key[m] = e·S + s    where 0 ≤ s < S and 0 ≤ e < E,    else -1

    expert_mark         the op of a mark, by which `match` sees that the experts ran
    expert_site         y + delta, which `match` inserts behind the base's product
    expert_slots        the keys, which `lower` computes for `add_delta_`
    run_expert_delta_   the delta by a generated CPU kernel that finds the keys itself

The add ops are plain aten. CPU kernels of the run ops are in dispatcher.cpp; their schemas have no
lists, which would double the time of a call (4.6 µs against 2.0). No gradient is registered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafx.errors import BatchError, LoweringError
from lorafx.kernels.ops.delta import add_embedding_delta, add_linear_delta, rescaled, row_slots
from lorafx.kernels.ops.op_library import (
    BANK,
    RANGES,
    BankArgs,
    Ranges,
    check_bank,
    check_by_column,
    check_embedding,
    check_linear,
    check_rows,
    define,
    require,
)
from lorafx.kernels.ops.own_rows import OWN_ROWS, OwnRows, own_embedding, own_linear

# The column ranges of each generated kernel that this process has loaded, by id.
KERNELS: dict[int, Ranges] = {}


def site(
    x: Tensor,
    y: Tensor,
    bank: BankArgs,
    ranges: Ranges,
    rows: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    gains: Tensor | None = None,
    addend: Tensor | None = None,
    replaced: OwnRows = OwnRows(),  # noqa: B008  an immutable tuple
    shifts: Tensor | None = None,
) -> Tensor:
    """y (..., N) + delta for x (..., K), a new contiguous tensor. `weight` and `bias` are for the
    `pack` pass, or for adapters that turn inputs. With `gains`, all of y but `addend` (N,) is
    rescaled; `shifts` are added last."""
    _check_site(x, y, bank, ranges, rows)
    check_by_column("site", bank.B, gains=gains, shifts=shifts)
    out = y.clone(memory_format=torch.contiguous_format)
    add_linear_delta(out, x, bank, ranges, rows)
    if replaced.own is not None:
        out = own_linear(x, out, *replaced, bank.slots, rows, weight)  # type: ignore[arg-type]
    if gains is None and shifts is None:
        return out
    owners = bank.slots, rows
    return rescaled(out, gains, addend, *owners, ranges.offsets, ranges.sizes, shifts)


def site_fake(x, y, bank: BankArgs, ranges: Ranges, rows, *_, **__):
    _check_site(x, y, bank, ranges, rows)
    return y.new_empty(y.shape)


def _check_site(x, y, bank, ranges, rows) -> None:
    check_linear("site", x, y.shape[-1], bank, ranges)
    check_rows("site", x.shape[:-1], y.shape[:-1], rows)


def embedding_site(
    ids: Tensor,
    y: Tensor,
    bank: BankArgs,
    rows: int,
    gains: Tensor | None = None,
    replaced: OwnRows = OwnRows(),  # noqa: B008  an immutable tuple
) -> Tensor:
    """y (*ids.shape, N) + scales · A[slot, ids, :r] B[slot, :r], rescaled by `gains`; a copy."""
    check_embedding("embedding_site", ids, y, bank, rows)
    check_by_column("embedding_site", bank.B, gains=gains)
    if replaced.own is not None:
        y = own_embedding(ids, y, *replaced[:3], bank.slots, rows)  # type: ignore[arg-type]
    out = y.clone(memory_format=torch.contiguous_format)
    add_embedding_delta(out, ids, bank, rows)
    if gains is None:
        return out
    return rescaled(out, gains, None, bank.slots, rows, [0], [y.shape[-1]])


def embedding_site_fake(ids, y, bank: BankArgs, rows, *_, **__):
    check_embedding("embedding_site", ids, y, bank, rows)
    return y.new_empty(y.shape)


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bank: BankArgs,
    ranges: Ranges,
    rows: int,
    transposed: bool,
) -> Tensor:
    """x Wᵀ + b (x W when transposed) with the delta of siblings[j] in the j-th column range."""
    _check_fused(x, weight, bank, ranges, rows, transposed)
    y = torch.nn.functional.linear(x, weight.T if transposed else weight, bias).contiguous()
    add_linear_delta(y, x, bank, ranges, rows)
    return y


def fused_linear_fake(x, weight, bias, bank: BankArgs, ranges: Ranges, rows, transposed):
    N = _check_fused(x, weight, bank, ranges, rows, transposed)
    return x.new_empty((*x.shape[:-1], N))


def _check_fused(x, weight, bank, ranges, rows, transposed):
    K, N = weight.shape if transposed else (weight.shape[1], weight.shape[0])
    require("fused_linear", x.shape[-1] == K, f"x has {x.shape[-1]} features, the weight {K}")
    check_linear("fused_linear", x, N, bank, ranges)
    check_rows("fused_linear", (), (), rows)
    return N


def add_delta_(y: Tensor, x: Tensor, bank: BankArgs, ranges: Ranges, rows: int) -> None:
    """Add the delta of `fused_linear` to y (..., Σsizes) in place."""
    add_delta_fake(y, x, bank, ranges, rows)
    add_linear_delta(y, x, bank, ranges, rows)


def add_delta_fake(y, x, bank: BankArgs, ranges: Ranges, rows) -> None:
    check_linear("add_delta_", x, y.shape[-1], bank, ranges)
    check_rows("add_delta_", x.shape[:-1], y.shape[:-1], rows)


def add_embedding_delta_(y: Tensor, ids: Tensor, bank: BankArgs, rows: int) -> None:
    """Add the delta of `embedding_site` to y in place."""
    add_embedding_delta_fake(y, ids, bank, rows)
    add_embedding_delta(y, ids, bank, rows)


def add_embedding_delta_fake(y, ids, bank: BankArgs, rows, kernel=0) -> None:
    check_embedding("add_embedding_delta_", ids, y, bank, rows)


def ranges_of(op: str, kernel: int) -> Ranges:
    if kernel not in KERNELS:
        raise LoweringError(
            f"lorafx::{op}: kernel {kernel} is not loaded in this process; build it with"
            " lorafx.kernels.cpu.delta_kernels.build before the graph runs"
        )
    return KERNELS[kernel]


def run_delta_(y: Tensor, x: Tensor, bank: BankArgs, rows: int, kernel: int) -> None:
    """`add_delta_` for the ranges of `kernel`; on a CPU dispatcher.cpp runs in its place."""
    add_delta_(y, x, bank, ranges_of("run_delta_", kernel), rows)


def run_delta_fake(y, x, bank: BankArgs, rows, kernel) -> None:
    check_bank("run_delta_", bank)
    check_rows("run_delta_", x.shape[:-1], y.shape[:-1], rows)


def run_embedding_delta_(y: Tensor, ids: Tensor, bank: BankArgs, rows: int, kernel: int) -> None:
    ranges_of("run_embedding_delta_", kernel)
    add_embedding_delta_(y, ids, bank, rows)


def expert_slots(slots: Tensor, experts: Tensor, rows: int, count: int, capacity: int) -> Tensor:
    """The key of each row, int32 (M,), for E = `count` and S = `capacity`. `experts`, integers
    (M,), outside of 0 … count − 1 are no expert. Raises BatchError for a slot of S or more."""
    owner = row_slots(slots, rows, experts.shape[0])
    if owner.device.type == "cpu" and bool((owner >= capacity).any()):
        raise BatchError(f"slot {int(owner.max())} in a batch, but the bank has {capacity} slots")
    return expert_keys(owner, experts, count, capacity)


def expert_keys(owner: Tensor, experts: Tensor, count: int, capacity: int) -> Tensor:
    """e S + s of each row of expert e with slot s, int32 (M,); -1 where either is out of range."""
    routed = (owner >= 0) & (owner < capacity) & (experts >= 0) & (experts < count)
    return torch.where(routed, experts * capacity + owner, -1).to(torch.int32)


def _add_expert_delta(
    y: Tensor, x: Tensor, bank: BankArgs, experts: Tensor, ranges: Ranges, rows: int, count: int
) -> None:
    keys = expert_slots(bank.slots, experts, rows, count, bank.ranks.shape[0] // count)
    add_linear_delta(y, x, bank._replace(slots=keys), ranges, 1)


def expert_mark(y: Tensor, A: Tensor) -> Tensor:
    """A copy of y, the result of a module of experts with the bank of A; `match` removes the op."""
    return y.clone()


def expert_site(
    x: Tensor, y: Tensor, bank: BankArgs, experts: Tensor, ranges: Ranges, rows: int, count: int
) -> Tensor:
    """y (M, N) + delta for x (M, K), row m of expert experts[m]; a new contiguous tensor."""
    _check_expert_site(x, y, bank, experts, ranges, rows, count)
    out = y.clone(memory_format=torch.contiguous_format)
    _add_expert_delta(out, x, bank, experts, ranges, rows, count)
    return out


def expert_site_fake(x, y, bank: BankArgs, experts, ranges: Ranges, rows, count):
    _check_expert_site(x, y, bank, experts, ranges, rows, count)
    return y.new_empty(y.shape)


def _check_expert_site(x, y, bank, experts, ranges, rows, count) -> None:
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
    """Add the delta of `expert_site` for the column ranges of `kernel` to y (M, N) in place.

    `alike`, int32 (E·S, G), is the bank's. `experts` are integers: the expert of each row (M,), or,
    with `ends`, the end of each expert's rows (E,), which are sorted; rows behind have no expert.
    """
    ranges = ranges_of("run_expert_delta_", kernel)
    if ends:
        numbers = torch.arange(x.shape[0], device=experts.device, dtype=experts.dtype)
        experts = torch.searchsorted(experts, numbers, right=True)
    _check_expert_site(x, y, bank, experts, ranges, rows, count)
    _add_expert_delta(y, x, bank, experts, ranges, rows, count)


def run_expert_delta_fake(y, x, bank: BankArgs, alike, experts, rows, count, ends, kernel) -> None:
    op, S = "run_expert_delta_", bank.ranks.shape[0]
    check_bank(op, bank)
    check_rows(op, x.shape[:-1], y.shape[:-1], rows)
    require(op, alike.dim() == 2 and alike.shape[0] == S, "alike is (S, siblings)")
    require(op, experts.dim() == 1, f"experts is a vector, not {tuple(experts.shape)}")


for _schema, _eager, _fake in (
    (
        f"site(Tensor x, Tensor y, {BANK}, {RANGES}, SymInt rows, Tensor? weight=None,"
        f" Tensor? bias=None, Tensor? gains=None, Tensor? addend=None, {OWN_ROWS},"
        " Tensor? shifts=None) -> Tensor",
        *(site, site_fake),
    ),
    (
        f"embedding_site(Tensor ids, Tensor y, {BANK}, SymInt rows, Tensor? gains=None,"
        f" {OWN_ROWS}) -> Tensor",
        *(embedding_site, embedding_site_fake),
    ),
    (
        f"fused_linear(Tensor x, Tensor weight, Tensor? bias, {BANK}, {RANGES}, SymInt rows,"
        " bool transposed) -> Tensor",
        *(fused_linear, fused_linear_fake),
    ),
    (
        f"add_delta_(Tensor(a!) y, Tensor x, {BANK}, {RANGES}, SymInt rows) -> ()",
        *(add_delta_, add_delta_fake),
    ),
    (
        f"add_embedding_delta_(Tensor(a!) y, Tensor ids, {BANK}, SymInt rows) -> ()",
        *(add_embedding_delta_, add_embedding_delta_fake),
    ),
    (
        f"run_delta_(Tensor(a!) y, Tensor x, {BANK}, SymInt rows, int kernel) -> ()",
        *(run_delta_, run_delta_fake),
    ),
    (
        f"run_embedding_delta_(Tensor(a!) y, Tensor ids, {BANK}, SymInt rows, int kernel) -> ()",
        *(run_embedding_delta_, add_embedding_delta_fake),
    ),
    (
        "expert_slots(Tensor slots, Tensor experts, SymInt rows, int count, int capacity)"
        " -> Tensor",
        *(expert_slots, lambda slots, experts, *_: slots.new_empty(experts.shape)),
    ),
    ("expert_mark(Tensor y, Tensor A) -> Tensor", expert_mark, lambda y, A: torch.empty_like(y)),
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

ADD_DELTA = torch.ops.lorafx.add_delta_.default
