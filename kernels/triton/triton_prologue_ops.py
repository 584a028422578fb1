"""The ops of a LoRA linear whose shrink computes its input. Importing this module registers them.

    lorafx::triton_shrink     v of x: what a delta needs that is added later, (P, M, J·R) float32
    lorafx::triton_activate   h = f(inputs), (M, K), and v of h
    lorafx::triton_expand_    y += v B in place

    gate/up    v₁ = triton_shrink(x);  y = x Wᵀ                          the delta is deferred
    down       h, v₂ = triton_activate([y, v₁, B₁, ranks₁]);  z = h Wᵀ;  triton_expand_(z, v₂)

So y is written once, by the vendor's GEMM, and read once, by the kernel that has to read it anyway:
the delta costs no traffic of its own there. `kernel` is an id of "deferred" for the first op and of
"prologue" for the other two; slots, rows and the bank are those of lorafx.kernels.ops.ops, with
rows > 0. As in triton_ops.py, on a CPU the same kernels run in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorafx.kernels.ops.bank_arguments import BankArgs
from lorafx.kernels.ops.op_checks import require
from lorafx.kernels.triton.activation import Leaf
from lorafx.kernels.triton.generated_op import generated_op
from lorafx.kernels.triton.launchers import Launch
from lorafx.kernels.triton.triton_build import LaunchPlan
from lorafx.kernels.triton.triton_checks import (
    check_linear,
    check_y,
    checked_plan,
    require_adjacent,
)
from lorafx.kernels.triton.triton_launch import LaunchArgs, activate, linear, shrink
from lorafx.torch_internals.symbols import guard_or_false


def _run_shrink(x: Tensor, bank: BankArgs, rows: int, kernel: int, launch: Launch) -> Tensor:
    """v (P, M, J·R) float32 of x (M, K), in P planes to be added up: scale · A x for each row's
    adapter. What the adapter has no factor for is not written, and must not be read.

    Raises:
        LoweringError: an argument that `kernel` was not made for.
    """
    plan = checked_plan("triton_shrink", kernel, ("deferred",), bank, rows)
    if guard_or_false(x.shape[0] == 0):
        return _shrink_fake(x, bank, rows, kernel)
    batch = LaunchArgs.of(x.shape[0], bank, rows, plan.order, launch)
    return shrink(plan.kernels["shrink"], plan.spec, x, batch)


def _shrink_fake(x, bank: BankArgs, rows, kernel):
    plan = checked_plan("triton_shrink", kernel, ("deferred",), bank, rows)
    check_linear("triton_shrink", plan, x, bank.A)
    return _planes(plan, "shrink", x, x.shape[0])


def _planes(plan: LaunchPlan, name: str, like: Tensor, rows: Any) -> Tensor:
    shape = (plan.kernels[name].tiles.parts, rows, plan.spec.planes)
    return like.new_empty(shape, dtype=torch.float32)


def _run_activate(
    inputs: Sequence[Tensor], bank: BankArgs, rows: int, kernel: int, launch: Launch
) -> tuple[Tensor, Tensor]:
    """h (M, K) = f(inputs), of x's dtype, and v of h as `triton_shrink` gives it.

    Args:
        inputs: the leaves of the kernel's activation; each is followed by its ids where it is
            gathered, and by v, B and ranks of the delta that it still lacks, where it lacks one.

    Raises:
        LoweringError: an argument that `kernel` was not made for.
    """
    plan = checked_plan("triton_activate", kernel, ("prologue",), bank, rows)
    M = check_inputs("triton_activate", plan, inputs, bank.A)
    if guard_or_false(M == 0):
        return _activate_fake(inputs, bank, rows, kernel)
    batch = LaunchArgs.of(M, bank, rows, plan.order, launch)
    return activate(plan.kernels["activate"], plan.spec, inputs, batch)


def _activate_fake(inputs, bank: BankArgs, rows, kernel):
    plan = checked_plan("triton_activate", kernel, ("prologue",), bank, rows)
    M, d = check_inputs("triton_activate", plan, inputs, bank.A), plan.spec.delta
    h = inputs[0].new_empty((M, d.in_features), dtype=d.x_dtype)
    return h, _planes(plan, "activate", h, M)


def _run_expand(
    y: Tensor, v: Tensor, bank: BankArgs, rows: int, kernel: int, launch: Launch
) -> None:
    """Adds v B into y (M, N) in place for v of `triton_activate`; base rows keep their bits.

    Raises:
        LoweringError: an argument that `kernel` was not made for.
    """
    _expand_fake(y, v, bank, rows, kernel)
    plan, M = checked_plan("triton_expand_", kernel, ("prologue",), bank, rows), y.shape[0]
    if guard_or_false(M == 0):
        return
    batch = LaunchArgs.of(M, bank, rows, plan.order, launch)
    linear(plan.kernels["expand"], plan.spec, y, v, None, batch)


def _expand_fake(y, v, bank: BankArgs, rows, kernel) -> None:
    op = "triton_expand_"
    plan = checked_plan(op, kernel, ("prologue",), bank, rows)
    check_y(op, plan, y, y.shape[0])
    _check_planes(op, v, (plan.kernels["expand"].tiles.parts, y.shape[0], plan.spec.planes))


def _check_planes(op: str, v: Tensor, shape: tuple[Any, ...]) -> None:
    require(
        op,
        tuple(v.shape) == shape and v.dtype == torch.float32 and v.is_contiguous(),
        f"v is {v.dtype} {tuple(v.shape)}, the kernel's contiguous float32 {shape}",
    )


def check_inputs(op: str, plan: LaunchPlan, inputs: Sequence[Tensor], A: Tensor) -> Any:
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
    if leaf.delta is not None:
        v, B, ranks = rest
        d = leaf.delta
        _check_planes(op, v, (leaf.planes, rows, len(d.sizes) * d.max_rank))
        require(
            op,
            B.dtype == d.bank_dtype and B.shape[1] == d.max_rank and B.shape[2] >= d.last_column,
            f"B of input {index} is {B.dtype} {tuple(B.shape)}, the kernel's {d.bank_dtype} "
            f"(S, {d.max_rank}, {d.last_column}) or wider",
        )
        require(
            op,
            B.stride()[1:] == (d.columns, 1) and ranks.stride(0) == d.group,
            f"B and ranks of input {index} are no part of the bank that the kernel was made for",
        )
    return rows


triton_shrink = generated_op("shrink", _run_shrink, _shrink_fake)
triton_activate = generated_op("activate", _run_activate, _activate_fake)
triton_expand_ = generated_op("expand_", _run_expand, _expand_fake, mutates_args=("y",))
