"""`lorafx::fused_experts`: a product with the weights of routed experts and its deltas as one op.

    y[m] = x[m] W[e]ᵀ + scales[key] · (x[m] A[key]ᵀ) B[key]        key = e·S + s

Rows are sorted by expert: those of expert e are offs[e - 1] … offs[e] - 1, and e = experts[m] says
the same. s is the slot of row m; the bank is that of lorafx.kernels.ops.expert_ops. What `fuse`
makes of a grouped product and its `expert_site`; `lorafx::triton_experts` is the same by generated
kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafx.kernels.ops.bank_arguments import BANK, RANGES, BankArgs, Ranges
from lorafx.kernels.ops.delta import add_linear_delta
from lorafx.kernels.ops.expert_ops import expert_slots
from lorafx.kernels.ops.op_checks import check_linear, check_rows, require
from lorafx.kernels.ops.op_library import define

SCHEMA = (
    f"fused_experts(Tensor x, Tensor weight, Tensor offs, {BANK}, Tensor experts, {RANGES},"
    " SymInt rows, bool transposed) -> Tensor"
)


def grouped_product(x: Tensor, weight: Tensor, offs: Tensor, transposed: bool) -> Tensor:
    """x[m] W[e]ᵀ (x[m] W[e] when transposed), (M, N); zeros in rows behind the last group. Waits
    for `offs` on a device."""
    right = weight if transposed else weight.mT
    y = x.new_zeros((x.shape[0], right.shape[2]))
    start = 0
    for expert, end in enumerate(offs.tolist()):
        torch.mm(x[start:end], right[expert], out=y[start:end])
        start = end
    return y


def fused_experts(
    x: Tensor,
    weight: Tensor,
    offs: Tensor,
    bank: BankArgs,
    experts: Tensor,
    ranges: Ranges,
    rows: int,
    transposed: bool,
) -> Tensor:
    """y (M, N) for x (M, K), weight (E, N, K) or, transposed, (E, K, N), offs integers (E,).

    Raises:
        LoweringError: shapes or dtypes that do not fit each other.
        ProvenanceError, BatchError: as `row_slots`.
    """
    _check(x, weight, offs, bank, experts, ranges, rows, transposed)
    y = grouped_product(x, weight, offs, transposed)
    E = weight.shape[0]
    keys = expert_slots(bank.slots, experts, rows, E, bank.ranks.shape[0] // E)
    add_linear_delta(y, x, bank._replace(slots=keys), ranges, 1)
    return y


def fused_experts_fake(x, weight, offs, bank: BankArgs, experts, ranges: Ranges, rows, transposed):
    _check(x, weight, offs, bank, experts, ranges, rows, transposed)
    return x.new_empty((x.shape[0], weight.shape[2 if transposed else 1]))


def _check(x, weight, offs, bank, experts, ranges, rows, transposed) -> None:
    op, S = "fused_experts", bank.ranks.shape[0]
    require(op, x.dim() == 2 and weight.dim() == 3, "x is (M, K) and the weight 3-d")
    E, N, K = weight.shape
    if transposed:
        N, K = K, N
    require(op, x.shape[1] == K, f"x has {x.shape[1]} features, the weight {K}")
    require(op, x.dtype == weight.dtype, f"x is {x.dtype}, the weight {weight.dtype}")
    check_ends(op, offs, E)
    check_linear(op, x, N, bank, ranges)
    require(op, S % E == 0, f"{E} experts do not divide {S} slots")
    check_rows(op, x.shape[:1], experts.shape, rows)


def check_ends(op: str, offs: Tensor, experts: int) -> None:
    """Refuses ends of groups that are not those of so many experts."""
    require(
        op,
        offs.dim() == 1 and offs.shape[0] == experts and offs.dtype in (torch.int32, torch.int64),
        f"offs is {offs.dtype} {tuple(offs.shape)}, not integers ({experts},)",
    )


define(SCHEMA, fused_experts, fused_experts_fake)
