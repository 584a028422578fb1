"""The ops that run generated Triton kernels. Importing this module registers them.

    lorafx::triton_linear            x Wᵀ + b and the deltas of all column ranges, (M, N)
    lorafx::triton_delta_            the deltas alone, added into y in place
    lorafx::triton_embedding_delta_  the delta of an embedding, added into y in place
    lorafx::triton_experts           products with routed experts' weights and their deltas, (M, N)

`kernel` is an id of build.py. Other arguments are as in lorafx.kernels.ops.linear_ops, with
rows > 0; the references are `lorafx::fused_linear`, `add_delta_`, `add_embedding_delta_` and
`fused_experts`. All raise LoweringError for an argument that `kernel` was not made for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lorafx.kernels.ops.expert_ops import check_ends
from lorafx.kernels.ops.op_checks import require
from lorafx.kernels.ops.op_library import BankArgs
from lorafx.kernels.triton.build import EXPERTS, LINEAR, LaunchPlan, plan_of
from lorafx.kernels.triton.launch import (
    Base,
    LaunchArgs,
    activate,
    embedding_rows,
    expand_rows,
    linear,
    shrink,
    split,
)
from lorafx.kernels.triton.launch_checks import (
    check_ids,
    check_linear,
    check_weight,
    check_y,
    checked_plan,
    require_adjacent,
)
from lorafx.kernels.triton.launchers import Launch, generated_op
from lorafx.kernels.triton.source import Leaf
from lorafx.torch_internals.symbols import guard_or_false


def _run_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bank: BankArgs,
    rows: int,
    kernel: int,
    launch: Launch,
) -> Tensor:
    y = _linear_fake(x, weight, bias, bank, rows, kernel)
    plan, M = plan_of(int(kernel)), x.shape[0]
    if guard_or_false(M == 0):
        return y
    bias = None if bias is None else bias.contiguous()  # N elements; kernels take no stride of it
    batch = LaunchArgs.of(M, bank, rows, plan.order, launch)
    v, sums = None, None
    *before, last = plan.kernels.values()
    if "shrink" in plan.kernels:
        v = shrink(before[0], plan.spec, x, batch)
    elif "split" in plan.kernels:
        sums, v = split(before[0], plan.spec, x, weight, y, batch)
    linear(last, plan.spec, y, v, Base(x, weight, bias, sums), batch)
    return y


def _linear_fake(x, weight, bias, bank: BankArgs, rows, kernel):
    op = "triton_linear"
    plan = checked_plan(op, kernel, LINEAR, bank, rows)
    spec, N = plan.spec, plan.spec.out_features
    check_linear(op, plan, x, bank.A)
    check_weight(op, plan, weight)
    require(
        op,
        (bias is not None) == spec.bias and (bias is None or bias.shape == (N,)),
        f"the kernel was made {'with' if spec.bias else 'without'} a bias of {N} columns",
    )
    return x.new_empty((x.shape[0], N), dtype=spec.delta.y_dtype)


def _run_delta(
    y: Tensor, x: Tensor, bank: BankArgs, rows: int, kernel: int, launch: Launch
) -> None:
    _delta_fake(y, x, bank, rows, kernel)
    plan, M = plan_of(int(kernel)), x.shape[0]
    if guard_or_false(M == 0):
        return
    batch = LaunchArgs.of(M, bank, rows, plan.order, launch)
    first, second = plan.kernels.values()
    v = shrink(first, plan.spec, x, batch)
    if plan.strategy == "gemv":
        expand_rows(second, plan.spec, y, v, batch)
    else:
        linear(second, plan.spec, y, v, None, batch)


def _delta_fake(y, x, bank: BankArgs, rows, kernel) -> None:
    plan = checked_plan("triton_delta_", kernel, ("segments", "gemv"), bank, rows)
    check_linear("triton_delta_", plan, x, bank.A)
    check_y("triton_delta_", plan, y, x.shape[0])


def _run_embedding_delta(
    y: Tensor, ids: Tensor, bank: BankArgs, rows: int, kernel: int, launch: Launch
) -> None:
    _embedding_fake(y, ids, bank, rows, kernel)
    plan, M = plan_of(int(kernel)), ids.shape[0]
    if guard_or_false(M == 0):
        return
    batch = LaunchArgs.of(M, bank, rows, plan.order, launch)
    embedding_rows(plan.kernels["embedding_rows"], plan.spec, y, ids, batch)


def _embedding_fake(y, ids, bank: BankArgs, rows, kernel) -> None:
    op, rank = "triton_embedding_delta_", bank.A.shape[2]
    plan = checked_plan(op, kernel, ("embedding",), bank, rows)
    check_ids(op, ids)
    require(op, rank == plan.spec.delta.max_rank, f"A has rank {rank}")
    check_y(op, plan, y, ids.shape[0])


EXPERTS_OP = "triton_experts"


def _run_experts(
    inputs: Sequence[Tensor],
    weight: Tensor,
    offs: Tensor,
    bank: BankArgs,
    rows: int,
    kernel: int,
    launch: Launch,
) -> Tensor:
    """`inputs` is [x], or what "activated" computes x from. Rows are sorted by expert, offs (E,)
    ends those of each; rows behind the last become 0. The host reads no number of rows."""
    y = _experts_fake(inputs, weight, offs, bank, rows, kernel)
    plan, M = plan_of(int(kernel)), y.shape[0]
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


def _experts_fake(inputs, weight, offs, bank: BankArgs, rows, kernel):
    plan = checked_plan(EXPERTS_OP, kernel, EXPERTS, bank, rows)
    spec, S = plan.spec, bank.ranks.shape[0]
    M = _check_inputs(plan, inputs, bank.A)
    check_weight(EXPERTS_OP, plan, weight, spec.experts)
    check_ends(EXPERTS_OP, offs, spec.experts)
    require_adjacent(EXPERTS_OP, offs=offs)
    require(EXPERTS_OP, S % spec.experts == 0, f"{spec.experts} experts do not divide {S} slots")
    return inputs[0].new_empty((M, spec.out_features), dtype=spec.delta.y_dtype)


def _check_inputs(plan: LaunchPlan, inputs: Sequence[Tensor], A: Tensor) -> Any:
    """The number of rows; refuses inputs that the plan's kernels were not made for."""
    activation = plan.spec.activation
    if activation is None:
        require(EXPERTS_OP, len(inputs) == 1, f"{len(inputs)} inputs; the kernel takes x alone")
        check_linear(EXPERTS_OP, plan, inputs[0], A)
        return inputs[0].shape[0]
    found = len(inputs)
    require(EXPERTS_OP, found == activation.inputs, f"{found} inputs, not {activation.inputs}")
    rows: list[Any] = []
    rest = list(inputs)
    for index, leaf in enumerate(activation.leaves):
        last = max(
            load.start + load.step * (plan.spec.delta.in_features - 1)
            for load in activation.loads
            if load.leaf == index
        )
        rows.append(_check_leaf(index, leaf, last, rest[: leaf.inputs]))
        del rest[: leaf.inputs]
    require(EXPERTS_OP, all(count == rows[0] for count in rows), f"inputs of {rows} rows")
    return rows[0]


def _check_leaf(index: int, leaf: Leaf, last: int, tensors: Sequence[Tensor]) -> Any:
    table = tensors[0]
    require(
        EXPERTS_OP,
        table.dim() == 2 and table.dtype == leaf.dtype and table.shape[1] > last,
        f"input {index} is {table.dtype} {tuple(table.shape)}, the kernel's {leaf.dtype} with "
        f"more than {last} columns",
    )
    require_adjacent(EXPERTS_OP, input=table)
    if leaf.gathered:
        check_ids(EXPERTS_OP, tensors[1])
    return tensors[-1].shape[0]


triton_linear = generated_op("linear", _run_linear, _linear_fake)
triton_delta_ = generated_op("delta_", _run_delta, _delta_fake, mutates_args=("y",))
triton_embedding_delta_ = generated_op(
    "embedding_delta_", _run_embedding_delta, _embedding_fake, mutates_args=("y",)
)
triton_experts = generated_op("experts", _run_experts, _experts_fake)
