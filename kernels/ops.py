"""The ops of namespace `lorafx`: schemas, fake implementations, eager references.

Importing this module registers them. What they share:

    slots   int32 (n,), -1 for a base row; rows m of x are counted over all its dimensions but the
            last (an embedding's over all dimensions of ids)
    rows    > 0: row m belongs to slots[(m // rows) % n]; 0: unproved, then all slots must be equal
    A, B    the bank of one group (lorafx.model.bank): A (S, G·R, K), B (S, R, ΣN);
            embedding: A (S, V, R). Only the first ranks[s, i] of the R factors are read.
    gains   DoRA's G (S, ΣN) float32, for banks that have it (lorafx.kernels.rescale)

    site                  y + the deltas of one module, the mark that `attach` leaves on it
    embedding_site        the same for an embedding
    fused_linear          base linear and the deltas of a pack, what `fuse` makes
    add_delta_            the delta alone, into y in place, what `lower` calls after the base GEMM
    add_embedding_delta_  the same for an embedding
    run_delta_            add_delta_ by a generated kernel, whose id stands for the column ranges
    run_embedding_delta_  the same for an embedding

The add ops are plain aten when `kernel` is 0 and otherwise call the run ops, whose CPU kernels are
in dispatcher.cpp: short schemas, because lists cost half the time of a call (4.6 µs against 2.0).
Inference only: no gradient is registered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_true

from lorafx.errors import LoweringError
from lorafx.kernels.delta import add_embedding_delta, add_linear_delta
from lorafx.kernels.op_library import define
from lorafx.kernels.rescale import rescaled

BANK = "Tensor A, Tensor B, Tensor ranks, Tensor scales, Tensor slots"
RANGES = "int[] siblings, int[] offsets, int[] sizes"
SCHEMAS = (
    f"site(Tensor x, Tensor y, {BANK}, {RANGES}, SymInt rows, Tensor? weight=None,"
    " Tensor? bias=None, Tensor? gains=None, Tensor? addend=None) -> Tensor",
    f"embedding_site(Tensor ids, Tensor y, {BANK}, SymInt rows, Tensor? gains=None) -> Tensor",
    f"fused_linear(Tensor x, Tensor weight, Tensor? bias, {BANK}, {RANGES}, SymInt rows,"
    " bool transposed) -> Tensor",
    f"add_delta_(Tensor(a!) y, Tensor x, {BANK}, {RANGES}, SymInt rows, int kernel) -> ()",
    f"add_embedding_delta_(Tensor(a!) y, Tensor ids, {BANK}, SymInt rows, int kernel) -> ()",
    f"run_delta_(Tensor(a!) y, Tensor x, {BANK}, SymInt rows, int kernel) -> ()",
    f"run_embedding_delta_(Tensor(a!) y, Tensor ids, {BANK}, SymInt rows, int kernel) -> ()",
)

# siblings, offsets, sizes of each generated kernel that this process has loaded, by id
KERNELS: dict[int, tuple[Sequence[int], Sequence[int], Sequence[int]]] = {}


def _require(op: str, condition: bool | torch.SymBool, message: str) -> None:
    if not guard_or_true(condition):
        raise LoweringError(f"lorafx::{op}: {message}")


def _check_bank(
    op: str, A: Tensor, B: Tensor, ranks: Tensor, scales: Tensor, slots: Tensor
) -> None:
    _require(op, A.dim() == B.dim() == 3, f"A and B are 3-d, not {A.dim()}-d and {B.dim()}-d")
    _require(op, A.dtype == B.dtype, f"A is {A.dtype} and B {B.dtype}; a bank has one dtype")
    _require(
        op,
        ranks.dim() == 2 and ranks.dtype == torch.int32,
        f"ranks is int32 (slots, siblings), not {ranks.dtype} {tuple(ranks.shape)}",
    )
    _require(
        op,
        scales.dim() == 2 and scales.dtype == torch.float32,
        f"scales is float32 (slots, siblings), not {scales.dtype} {tuple(scales.shape)}",
    )
    _require(
        op,
        slots.dim() == 1 and slots.dtype == torch.int32,
        f"slots is int32 (requests,), not {slots.dtype} {tuple(slots.shape)}",
    )
    S, G = ranks.shape
    for name, tensor in (("A", A), ("B", B), ("scales", scales)):
        _require(op, tensor.shape[0] == S, f"{name} has {tensor.shape[0]} slots, ranks has {S}")
    _require(op, scales.shape[1] == G, f"scales has {scales.shape[1]} siblings, ranks has {G}")


def _check_gains(op: str, B: Tensor, gains: Tensor | None) -> None:
    if gains is not None:
        want, have = (B.shape[0], B.shape[2]), tuple(gains.shape)
        _require(op, have == want, f"gains is (slots, columns) {want}, not {have}")
        _require(op, gains.dtype == torch.float32, f"gains is float32, not {gains.dtype}")


def _check_linear(
    op: str,
    x: Tensor,
    y_features: int | torch.SymInt,
    A: Tensor,
    B: Tensor,
    ranks: Tensor,
    scales: Tensor,
    slots: Tensor,
    siblings: Sequence[int],
    offsets: Sequence[int],
    sizes: Sequence[int],
) -> None:
    _check_bank(op, A, B, ranks, scales, slots)
    G, R, columns = ranks.shape[1], B.shape[1], B.shape[2]
    _require(op, x.dim() >= 1 and x.is_floating_point(), "x is a floating-point tensor")
    _require(
        op, A.shape[1] == G * R, f"A has {A.shape[1]} rows a slot, not {G} siblings times rank {R}"
    )
    _require(
        op, A.shape[2] == x.shape[-1], f"x has {x.shape[-1]} features, A was made for {A.shape[2]}"
    )
    _require(
        op,
        len(siblings) == len(offsets) == len(sizes),
        f"{len(siblings)} siblings, {len(offsets)} offsets and {len(sizes)} sizes do not pair up",
    )
    _require(
        op, sum(sizes) == y_features, f"sizes {list(sizes)} do not fill y's {y_features} columns"
    )
    for i, offset, size in zip(siblings, offsets, sizes, strict=True):
        _require(op, i in range(G), f"sibling {i} of a group of {G}")
        _require(
            op,
            offset >= 0 and offset + size <= columns,
            f"columns [{offset}, {offset + size}) of a bank of {columns} columns",
        )


def _check_rows(
    op: str, x_shape: Sequence[int], y_shape: Sequence[int], rows: int | torch.SymInt
) -> None:
    _require(op, rows >= 0, f"rows is {rows}; it is a row count a request, or 0 for unproved")
    x_rows, y_rows = 1, 1
    for size in x_shape:
        x_rows = x_rows * size
    for size in y_shape:
        y_rows = y_rows * size
    _require(op, x_rows == y_rows, f"x has {x_rows} rows and y has {y_rows}")


def _check_embedding(
    op: str,
    ids: Tensor,
    y: Tensor,
    A: Tensor,
    B: Tensor,
    ranks: Tensor,
    scales: Tensor,
    slots: Tensor,
    rows: int | torch.SymInt,
) -> None:
    _check_bank(op, A, B, ranks, scales, slots)
    _check_rows(op, ids.shape, y.shape[:-1], rows)
    _require(
        op, ids.dtype in (torch.int32, torch.int64), f"ids is an integer tensor, not {ids.dtype}"
    )
    _require(op, ranks.shape[1] == 1, "an embedding has no siblings")
    _require(op, A.shape[2] == B.shape[1], f"A has rank {A.shape[2]} and B {B.shape[1]}")
    _require(
        op, B.shape[2] == y.shape[-1], f"y has {y.shape[-1]} columns, B was made for {B.shape[2]}"
    )


def site(
    x: Tensor,
    y: Tensor,
    A: Tensor,
    B: Tensor,
    ranks: Tensor,
    scales: Tensor,
    slots: Tensor,
    siblings: Sequence[int],
    offsets: Sequence[int],
    sizes: Sequence[int],
    rows: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    gains: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """y (..., N) + delta for x (..., K), a new contiguous tensor of y's dtype.

    The j-th column range of y gets the delta of siblings[j]: several where one module computes
    several projections. `weight` and `bias` are the group's packed base parameters, carried for
    the `pack` pass only. With `gains` all of y but `addend` (N,) is rescaled then.
    """
    ranges = (siblings, offsets, sizes)
    _check_linear("site", x, y.shape[-1], A, B, ranks, scales, slots, *ranges)
    _check_rows("site", x.shape[:-1], y.shape[:-1], rows)
    _check_gains("site", B, gains)
    out = y.clone(memory_format=torch.contiguous_format)
    add_linear_delta(out, x, A, B, ranks, scales, slots, *ranges, rows)
    return out if gains is None else rescaled(out, gains, addend, slots, rows, offsets, sizes)


def site_fake(x, y, A, B, ranks, scales, slots, siblings, offsets, sizes, rows, *_, **__):
    ranges = (siblings, offsets, sizes)
    _check_linear("site", x, y.shape[-1], A, B, ranks, scales, slots, *ranges)
    _check_rows("site", x.shape[:-1], y.shape[:-1], rows)
    return y.new_empty(y.shape)


def embedding_site(
    ids: Tensor,
    y: Tensor,
    A: Tensor,
    B: Tensor,
    ranks: Tensor,
    scales: Tensor,
    slots: Tensor,
    rows: int,
    gains: Tensor | None = None,
) -> Tensor:
    """y (*ids.shape, N) + scales · A[slot, ids, :r] B[slot, :r], a new contiguous tensor.

    With `gains` it is rescaled then.
    """
    _check_embedding("embedding_site", ids, y, A, B, ranks, scales, slots, rows)
    _check_gains("embedding_site", B, gains)
    out = y.clone(memory_format=torch.contiguous_format)
    add_embedding_delta(out, ids, A, B, ranks, scales, slots, rows)
    if gains is None:
        return out
    return rescaled(out, gains, None, slots, rows, [0], [y.shape[-1]])


def embedding_site_fake(ids, y, A, B, ranks, scales, slots, rows, gains=None):
    _check_embedding("embedding_site", ids, y, A, B, ranks, scales, slots, rows)
    return y.new_empty(y.shape)


def _check_fused(x, weight, bias, A, B, ranks, scales, slots, siblings, offsets, sizes, rows, t):
    K, N = weight.shape if t else (weight.shape[1], weight.shape[0])
    _require("fused_linear", x.shape[-1] == K, f"x has {x.shape[-1]} features, the weight {K}")
    _check_linear("fused_linear", x, N, A, B, ranks, scales, slots, siblings, offsets, sizes)
    _check_rows("fused_linear", (), (), rows)
    return N


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    ranks: Tensor,
    scales: Tensor,
    slots: Tensor,
    siblings: Sequence[int],
    offsets: Sequence[int],
    sizes: Sequence[int],
    rows: int,
    transposed: bool,
) -> Tensor:
    """x Wᵀ + b (x W when transposed) with the delta of siblings[j] in the j-th column range."""
    ranges = (siblings, offsets, sizes)
    _check_fused(x, weight, bias, A, B, ranks, scales, slots, *ranges, rows, transposed)
    y = torch.nn.functional.linear(x, weight.T if transposed else weight, bias)
    y = y.contiguous()
    add_linear_delta(y, x, A, B, ranks, scales, slots, *ranges, rows)
    return y


def fused_linear_fake(
    x, weight, bias, A, B, ranks, scales, slots, siblings, offsets, sizes, rows, transposed
):
    ranges = (siblings, offsets, sizes)
    N = _check_fused(x, weight, bias, A, B, ranks, scales, slots, *ranges, rows, transposed)
    return x.new_empty((*x.shape[:-1], N))


def add_delta_(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    ranks: Tensor,
    scales: Tensor,
    slots: Tensor,
    siblings: Sequence[int],
    offsets: Sequence[int],
    sizes: Sequence[int],
    rows: int,
    kernel: int,
) -> None:
    """The delta of `fused_linear`, added into y (..., Σsizes) in place; aten if `kernel` is 0."""
    if kernel:
        torch.ops.lorafx.run_delta_(y, x, A, B, ranks, scales, slots, rows, kernel)
        return
    ranges = (siblings, offsets, sizes)
    _check_linear("add_delta_", x, y.shape[-1], A, B, ranks, scales, slots, *ranges)
    _check_rows("add_delta_", x.shape[:-1], y.shape[:-1], rows)
    add_linear_delta(y, x, A, B, ranks, scales, slots, *ranges, rows)


def add_delta_fake(
    y, x, A, B, ranks, scales, slots, siblings, offsets, sizes, rows, kernel
) -> None:
    ranges = (siblings, offsets, sizes)
    _check_linear("add_delta_", x, y.shape[-1], A, B, ranks, scales, slots, *ranges)
    _check_rows("add_delta_", x.shape[:-1], y.shape[:-1], rows)


def add_embedding_delta_(
    y: Tensor,
    ids: Tensor,
    A: Tensor,
    B: Tensor,
    ranks: Tensor,
    scales: Tensor,
    slots: Tensor,
    rows: int,
    kernel: int,
) -> None:
    """The delta of `embedding_site`, added into y in place; aten if `kernel` is 0."""
    if kernel:
        torch.ops.lorafx.run_embedding_delta_(y, ids, A, B, ranks, scales, slots, rows, kernel)
        return
    _check_embedding("add_embedding_delta_", ids, y, A, B, ranks, scales, slots, rows)
    add_embedding_delta(y, ids, A, B, ranks, scales, slots, rows)


def add_embedding_delta_fake(y, ids, A, B, ranks, scales, slots, rows, kernel) -> None:
    _check_embedding("add_embedding_delta_", ids, y, A, B, ranks, scales, slots, rows)


def _ranges_of(op: str, kernel: int) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    if kernel not in KERNELS:
        raise LoweringError(
            f"lorafx::{op}: kernel {kernel} is not loaded in this process; build it with"
            " lorafx.kernels.cpu.build before the graph runs"
        )
    return KERNELS[kernel]


def run_delta_(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    ranks: Tensor,
    scales: Tensor,
    slots: Tensor,
    rows: int,
    kernel: int,
) -> None:
    """`add_delta_` for the column ranges that `kernel` was generated for.

    This is what runs off the CPU; on it, the generated code does, from dispatcher.cpp.
    """
    ranges = _ranges_of("run_delta_", kernel)
    add_delta_(y, x, A, B, ranks, scales, slots, *ranges, rows, 0)


def run_delta_fake(y, x, A, B, ranks, scales, slots, rows, kernel) -> None:
    _check_bank("run_delta_", A, B, ranks, scales, slots)
    _check_rows("run_delta_", x.shape[:-1], y.shape[:-1], rows)


def run_embedding_delta_(
    y: Tensor,
    ids: Tensor,
    A: Tensor,
    B: Tensor,
    ranks: Tensor,
    scales: Tensor,
    slots: Tensor,
    rows: int,
    kernel: int,
) -> None:
    """`add_embedding_delta_` where `kernel` has no generated code."""
    _ranges_of("run_embedding_delta_", kernel)
    add_embedding_delta_(y, ids, A, B, ranks, scales, slots, rows, 0)


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., object], Callable[..., object]]] = {
    "site": (site, site_fake),
    "embedding_site": (embedding_site, embedding_site_fake),
    "fused_linear": (fused_linear, fused_linear_fake),
    "add_delta_": (add_delta_, add_delta_fake),
    "add_embedding_delta_": (add_embedding_delta_, add_embedding_delta_fake),
    "run_delta_": (run_delta_, run_delta_fake),
    "run_embedding_delta_": (run_embedding_delta_, add_embedding_delta_fake),
}
for _schema in SCHEMAS:
    define(_schema, *_IMPLEMENTATIONS[_schema.partition("(")[0]])
