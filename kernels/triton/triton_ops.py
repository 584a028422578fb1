"""The ops that run generated Triton kernels. Importing this module registers them.

    lorafx::triton_linear            x Wᵀ + b and the deltas of all column ranges, (M, N)
    lorafx::triton_delta_            the deltas alone, added into y in place
    lorafx::triton_embedding_delta_  the delta of an embedding, added into y in place

`kernel` is an id of triton_build.py, which stands for strategy, sizes and column ranges; slots,
rows and the bank are those of lorafx.kernels.ops.ops, with rows > 0. The torch reference is
`lorafx::fused_linear`, `add_delta_` and `add_embedding_delta_` with the same ranges.

How each is defined is in generated_op.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafx.kernels.ops.bank_arguments import BankArgs
from lorafx.kernels.ops.op_checks import require
from lorafx.kernels.triton.generated_op import generated_op
from lorafx.kernels.triton.launchers import Launch
from lorafx.kernels.triton.triton_build import LINEAR, LaunchPlan, plan_of
from lorafx.kernels.triton.triton_checks import (
    check_linear,
    check_y,
    checked_plan,
    require_adjacent,
)
from lorafx.kernels.triton.triton_launch import (
    Base,
    LaunchArgs,
    embedding_rows,
    expand_rows,
    linear,
    shrink,
    split,
)
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
    """x (M, K) times the weight, with bias and every range's delta: (M, N) of y's dtype.

    Raises:
        LoweringError: an argument that `kernel` was not made for.
    """
    plan = checked_plan("triton_linear", kernel, LINEAR, bank, rows)
    spec, M = plan.spec, x.shape[0]
    y = _linear_fake(x, weight, bias, bank, rows, kernel)
    if guard_or_false(M == 0):
        return y
    bias = None if bias is None else bias.contiguous()  # N elements; kernels take no stride of it
    batch = LaunchArgs.of(M, bank, rows, plan.order, launch)
    v, sums = None, None
    *before, last = plan.kernels.values()
    if "shrink" in plan.kernels:
        v = shrink(before[0], spec, x, batch)
    elif "split" in plan.kernels:
        sums, v = split(before[0], spec, x, weight, y, batch)
    linear(last, spec, y, v, Base(x, weight, bias, sums), batch)
    return y


def _linear_fake(x, weight, bias, bank: BankArgs, rows, kernel):
    plan = checked_plan("triton_linear", kernel, LINEAR, bank, rows)
    spec = plan.spec
    check_linear("triton_linear", plan, x, bank.A)
    K, N = spec.delta.in_features, spec.out_features
    shape = (K, N) if spec.transposed else (N, K)
    require(
        "triton_linear",
        tuple(weight.shape) == shape and weight.dtype == spec.weight_dtype,
        f"the weight is {weight.dtype} {tuple(weight.shape)}, the kernel's {shape}",
    )
    require(
        "triton_linear",
        (bias is not None) == spec.bias and (bias is None or bias.shape == (N,)),
        f"the kernel was made {'with' if spec.bias else 'without'} a bias of {N} columns",
    )
    require_adjacent("triton_linear", weight=weight)
    return x.new_empty((x.shape[0], N), dtype=spec.delta.y_dtype)


def _run_delta(
    y: Tensor,
    x: Tensor,
    bank: BankArgs,
    rows: int,
    kernel: int,
    launch: Launch,
) -> None:
    """Adds every range's delta for x (M, K) into y (M, N) in place; base rows keep their bits.

    Raises:
        LoweringError: an argument that `kernel` was not made for.
    """
    plan = _delta_plan(y, x, bank, rows, kernel)
    spec, M = plan.spec, x.shape[0]
    if guard_or_false(M == 0):
        return
    batch = LaunchArgs.of(M, bank, rows, plan.order, launch)
    first, second = plan.kernels.values()
    v = shrink(first, spec, x, batch)
    if plan.strategy == "gemv":
        expand_rows(second, spec, y, v, batch)
    else:
        linear(second, spec, y, v, None, batch)


def _delta_fake(y, x, bank: BankArgs, rows, kernel) -> None:
    _delta_plan(y, x, bank, rows, kernel)


def _delta_plan(y, x, bank, rows, kernel) -> LaunchPlan:
    plan = checked_plan("triton_delta_", kernel, ("segments", "gemv"), bank, rows)
    check_linear("triton_delta_", plan, x, bank.A, y)
    return plan


def _run_embedding_delta(
    y: Tensor,
    ids: Tensor,
    bank: BankArgs,
    rows: int,
    kernel: int,
    launch: Launch,
) -> None:
    """Adds the delta of ids (M,) into y (M, N) in place; base rows keep their bits.

    Raises:
        LoweringError: an argument that `kernel` was not made for.
    """
    _embedding_fake(y, ids, bank, rows, kernel)
    plan, M = plan_of(int(kernel)), ids.shape[0]
    if guard_or_false(M == 0):
        return
    batch = LaunchArgs.of(M, bank, rows, plan.order, launch)
    embedding_rows(plan.kernels["embedding_rows"], plan.spec, y, ids, batch)


def _embedding_fake(y, ids, bank: BankArgs, rows, kernel) -> None:
    op, rank = "triton_embedding_delta_", bank.A.shape[2]
    plan = checked_plan(op, kernel, ("embedding",), bank, rows)
    require(
        op,
        ids.dim() == 1 and ids.dtype in (torch.int32, torch.int64),
        f"ids is {ids.dtype} {tuple(ids.shape)}, the kernel's int32 or int64 (M,)",
    )
    require_adjacent(op, ids=ids)
    require(op, rank == plan.spec.delta.max_rank, f"A has rank {rank}")
    check_y(op, plan, y, ids.shape[0])


triton_linear = generated_op("linear", _run_linear, _linear_fake)
triton_delta_ = generated_op("delta_", _run_delta, _delta_fake, mutates_args=("y",))
triton_embedding_delta_ = generated_op(
    "embedding_delta_", _run_embedding_delta, _embedding_fake, mutates_args=("y",)
)
