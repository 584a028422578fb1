"""Checks of real or fake arguments before generated Triton kernels are launched; each raises
LoweringError with the op's name and what does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorafx.kernels.ops.delta_spec import have_strides
from lorafx.kernels.ops.op_checks import check_bank, require
from lorafx.kernels.ops.op_library import BankArgs
from lorafx.kernels.triton.build import LaunchPlan, plan_of
from lorafx.torch_internals.symbols import guard_or_false


def adjacent(tensor: Tensor) -> bool:
    """Whether the elements of a row lie side by side, as the kernels read and write them."""
    return guard_or_false(tensor.shape[-1] == 1) or guard_or_false(tensor.stride(-1) == 1)


def require_adjacent(op: str, **tensors: Tensor) -> None:
    """Refuses strided rows: a graph's author makes the copy, or plans another strategy."""
    for name, tensor in tensors.items():
        require(
            op,
            adjacent(tensor),
            f"the rows of {name} have strides {tuple(tensor.stride())}, but this kernel "
            f"needs the elements of a row side by side; pass {name}.contiguous(), or use "
            "lorafx::fused_linear or add_delta_",
        )


def checked_plan(
    op: str, kernel: int, strategies: Sequence[str], bank: BankArgs, rows: Any
) -> LaunchPlan:
    """The plan of `kernel`, if it is of these strategies and for such a bank."""
    # A triton_op's schema has no plain int: where Dynamo made the id a symbol, int() guards on it.
    plan = plan_of(int(kernel))
    d = plan.spec.delta
    A, B, ranks, _, slots = bank
    require(op, plan.strategy in strategies, f"kernel {kernel} is one of {plan.strategy!r}")
    check_bank(op, bank)
    require(op, rows > 0, f"rows is {rows}; a kernel needs proved row ownership")
    require(op, slots.shape[0] > 0, "slots is empty; give one slot per request")
    require(op, A.dtype == d.bank_dtype, f"the bank is {A.dtype}, the kernel's {d.bank_dtype}")
    R, group, columns = d.max_rank, d.group, d.columns
    require(
        op,
        B.shape[1] == R and B.shape[2] >= d.last_column,
        f"B is {tuple(B.shape)}, the kernel's (S, {R}, {d.last_column}) or wider",
    )
    require(op, ranks.shape[1] > max(d.siblings), f"ranks is for {ranks.shape[1]} siblings")
    factor = group * d.in_features
    laid = {"B": (d.slot_rows * columns, columns, 1), "ranks": (group, 1), "scales": (group, 1)}
    if not d.embedding:
        laid["A"] = (d.slot_rows * factor, factor, 1)
    for name, strides in laid.items():
        tensor = getattr(bank, name)
        # It may show some siblings of the bank.
        require(
            op,
            have_strides(tensor, strides),
            f"{name} has strides {tuple(tensor.stride())}, not {strides}: it is not part of the "
            "bank that the kernel was made for",
        )
    require(op, slots.is_contiguous(), "slots is not contiguous")
    return plan


def check_a(op: str, plan: LaunchPlan, A: Tensor) -> None:
    d = plan.spec.delta
    shown = (max(d.siblings) + 1) * d.in_features
    require(
        op,
        A.shape[1] == d.max_rank and A.shape[2] >= shown,
        f"A is {tuple(A.shape)}, the kernel's (S, {d.max_rank}, {shown}) or wider",
    )


def check_linear(op: str, plan: LaunchPlan, x: Tensor, A: Tensor) -> None:
    d = plan.spec.delta
    require(
        op,
        x.dim() == 2 and x.shape[1] == d.in_features and x.dtype == d.x_dtype,
        f"x is {x.dtype} {tuple(x.shape)}, the kernel's {d.x_dtype} (M, {d.in_features})",
    )
    check_a(op, plan, A)
    require_adjacent(op, x=x)


def check_weight(op: str, plan: LaunchPlan, weight: Tensor, *leading: int) -> None:
    spec = plan.spec
    K, N = spec.delta.in_features, spec.out_features
    shape = (*leading, K, N) if spec.transposed else (*leading, N, K)
    require(
        op,
        tuple(weight.shape) == shape and weight.dtype == spec.weight_dtype,
        f"the weight is {weight.dtype} {tuple(weight.shape)}, the kernel's {shape}",
    )
    require_adjacent(op, weight=weight)


def check_ids(op: str, ids: Tensor) -> None:
    require(
        op,
        ids.dim() == 1 and ids.dtype in (torch.int32, torch.int64),
        f"ids is {ids.dtype} {tuple(ids.shape)}, the kernel's int32 or int64 (M,)",
    )
    require_adjacent(op, ids=ids)


def check_y(op: str, plan: LaunchPlan, y: Tensor, rows: Any) -> None:
    d, N = plan.spec.delta, plan.spec.out_features
    require(
        op,
        y.dim() == 2 and y.shape[1] == N and y.dtype == d.y_dtype,
        f"y is {y.dtype} {tuple(y.shape)}, the kernel's {d.y_dtype} (M, {N})",
    )
    require(op, y.shape[0] == rows, f"y has {y.shape[0]} rows, not {rows}")
    require_adjacent(op, y=y)
