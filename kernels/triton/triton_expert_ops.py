"""`lorafx::triton_experts`: products with routed experts' weights and their deltas, by generated
Triton kernels. Importing this module registers it.

    y[m] = x[m] W[e]ᵀ + v[m] B[e·S + s]        v[m] = scale · x[m] A[e·S + s]ᵀ

`inputs` is [x], or what x is computed from in the shrink ("activated"). Rows are sorted by expert,
offs (E,) says where each one's end; rows behind the last are set to 0. Nothing of how many rows an
expert has is read on the host. The torch reference is `lorafx::fused_experts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorafx.kernels.ops.bank_arguments import BankArgs
from lorafx.kernels.ops.fused_experts import check_ends
from lorafx.kernels.ops.op_checks import require
from lorafx.kernels.triton.activation import Leaf
from lorafx.kernels.triton.generated_op import generated_op
from lorafx.kernels.triton.launchers import Launch
from lorafx.kernels.triton.triton_build import EXPERTS, LaunchPlan
from lorafx.kernels.triton.triton_checks import check_linear, checked_plan, require_adjacent
from lorafx.kernels.triton.triton_launch import Base, LaunchArgs, activate, linear, shrink
from lorafx.torch_internals.symbols import guard_or_false

OP = "triton_experts"


def _run(
    inputs: Sequence[Tensor],
    weight: Tensor,
    offs: Tensor,
    bank: BankArgs,
    rows: int,
    kernel: int,
    launch: Launch,
) -> Tensor:
    """x times the weights of its rows' experts, with every range's delta: (M, N) of y's dtype.

    Raises:
        LoweringError: an argument that `kernel` was not made for.
    """
    plan = checked_plan(OP, kernel, EXPERTS, bank, rows)
    y = _fake(inputs, weight, offs, bank, rows, kernel)
    M = y.shape[0]
    if guard_or_false(M == 0):
        return y
    batch = LaunchArgs.of(M, bank, rows, None, launch, offs)
    first, last = plan.kernels.values()
    if plan.strategy == "activated":
        x, v = activate(first, plan.spec, inputs, batch)
    else:
        x = inputs[0]
        v = shrink(first, plan.spec, x, batch)
    linear(last, plan.spec, y, v, Base(x, weight, None), batch)
    return y


def _fake(inputs, weight, offs, bank: BankArgs, rows, kernel):
    plan = checked_plan(OP, kernel, EXPERTS, bank, rows)
    spec, d = plan.spec, plan.spec.delta
    K, N, E = d.in_features, spec.out_features, spec.experts
    S, M = bank.ranks.shape[0], _check_inputs(OP, plan, inputs, bank.A)
    shape = (E, K, N) if spec.transposed else (E, N, K)
    require(
        OP,
        tuple(weight.shape) == shape and weight.dtype == spec.weight_dtype,
        f"the weight is {weight.dtype} {tuple(weight.shape)}, the kernel's {shape}",
    )
    require_adjacent(OP, weight=weight)
    check_ends(OP, offs, E)
    require_adjacent(OP, offs=offs)
    require(OP, S % E == 0, f"{E} experts do not divide {S} slots")
    return inputs[0].new_empty((M, N), dtype=d.y_dtype)


def _check_inputs(op: str, plan: LaunchPlan, inputs: Sequence[Tensor], A: Tensor) -> Any:
    """Refuses inputs that the plan's kernels were not made for; returns the number of rows."""
    activation = plan.spec.activation
    if activation is None:
        require(op, len(inputs) == 1, f"{len(inputs)} inputs; the kernel takes x alone")
        check_linear(op, plan, inputs[0], A)
        return inputs[0].shape[0]
    found = len(inputs)
    require(op, found == activation.inputs, f"{found} inputs, not {activation.inputs}")
    rows: list[Any] = []
    rest = list(inputs)
    for index, leaf in enumerate(activation.leaves):
        last = max(
            load.start + load.step * (plan.spec.delta.in_features - 1)
            for load in activation.loads
            if load.leaf == index
        )
        own, rest = rest[: leaf.inputs], rest[leaf.inputs :]
        rows.append(_check_leaf(op, index, leaf, last, own))
    require(op, all(count == rows[0] for count in rows), f"inputs of {rows} rows")
    return rows[0]


def _check_leaf(op: str, index: int, leaf: Leaf, last: int, own: Sequence[Tensor]) -> Any:
    """Checks one leaf and what goes with it; returns its rows."""
    table, *rest = own
    require(
        op,
        table.dim() == 2 and table.dtype == leaf.dtype and table.shape[1] > last,
        f"input {index} is {table.dtype} {tuple(table.shape)}, the kernel's {leaf.dtype} with "
        f"more than {last} columns",
    )
    require_adjacent(op, input=table)
    rows = table.shape[0]
    if leaf.gathered:
        ids, *rest = rest
        require(
            op,
            ids.dim() == 1 and ids.dtype in (torch.int32, torch.int64),
            f"the rows of input {index} are chosen by {ids.dtype} {tuple(ids.shape)}",
        )
        require_adjacent(op, ids=ids)
        rows = ids.shape[0]
    return rows


triton_experts = generated_op("experts", _run, _fake)
