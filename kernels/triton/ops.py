"""The ops that run generated Triton kernels. Importing this module registers them.

    lorafx::triton_linear            x Wᵀ + b and the deltas of all column ranges, (M, N)
    lorafx::triton_delta_            the deltas alone, added into y in place
    lorafx::triton_embedding_delta_  the delta of an embedding, added into y in place
    lorafx::triton_concat_           B behind the columns of W and v behind those of x

`kernel` is an id of build.py. Other arguments are as in lorafx.kernels.ops.linear_ops, with
rows > 0; the references are `lorafx::fused_linear`, `add_delta_` and `add_embedding_delta_`. All
raise LoweringError, with the op's name and what does not fit, for a real or fake argument that
`kernel` was not made for.

"concat" (docs/kernels.md) is one product of the vendor's for x' = [x | v] and W' = [W | B]:

    gather   W'[column, d-th block of its sibling, r] = B[slot of block d, r, column]
    place    x'[m, block of m, r] = scale · Σ_k A[slot of m, sibling, r, k] x[m, k]

    |ŷ - y| ≤ u |y| + u Σ_k |v_k| |B_k| + (2K + r + 8) 2⁻²⁴ |y|₁      u = 2⁻⁸ for bfloat16
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorafx.kernels.ops.delta_spec import have_strides
from lorafx.kernels.ops.op_library import BankArgs, check_bank, require
from lorafx.kernels.triton.build import CONCAT, LINEAR, LaunchPlan, plan_of
from lorafx.kernels.triton.generated import GeneratedKernel, Launch, generated_op
from lorafx.kernels.triton.launch import (
    Base,
    LaunchArgs,
    embedding_rows,
    expand_rows,
    linear,
    shrink,
    split,
)
from lorafx.kernels.triton.source import TritonSpec
from lorafx.torch_internals.graph_parts import guard_or_false


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


def check_operand(
    op: str, name: str, tensor: Tensor, dtype: torch.dtype | None, *shape: Any
) -> None:
    """Refuses another dtype or shape than the kernel's, in which a letter stands for any size."""
    sizes = zip(tensor.shape, shape, strict=False)
    fits = tensor.dim() == len(shape) and all(isinstance(n, str) or have == n for have, n in sizes)
    have, wanted = f"{tensor.dtype} {tuple(tensor.shape)}", ", ".join(map(str, shape))
    require(
        op, fits and tensor.dtype == dtype, f"{name} is {have}, the kernel's {dtype} ({wanted})"
    )


def check_linear(op: str, plan: LaunchPlan, x: Tensor, A: Tensor) -> None:
    d = plan.spec.delta
    check_operand(op, "x", x, d.x_dtype, "M", d.in_features)
    check_a(op, plan, A)
    require_adjacent(op, x=x)


def check_y(op: str, plan: LaunchPlan, y: Tensor, rows: Any) -> None:
    check_operand(op, "y", y, plan.spec.delta.y_dtype, "M", plan.spec.out_features)
    require(op, y.shape[0] == rows, f"y has {y.shape[0]} rows, not {rows}")
    require_adjacent(op, y=y)


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
    first, last = plan.kernels.values()
    if first.name == "split":
        sums, v = split(first, plan.spec, x, weight, y, batch)
    else:
        sums, v = None, shrink(first, plan.spec, x, batch)
    linear(last, plan.spec, y, v, Base(x, weight, bias, sums), batch)
    return y


def _linear_fake(x, weight, bias, bank: BankArgs, rows, kernel):
    op = "triton_linear"
    plan = checked_plan(op, kernel, LINEAR, bank, rows)
    spec, K, N = plan.spec, plan.spec.delta.in_features, plan.spec.out_features
    check_linear(op, plan, x, bank.A)
    shape = (K, N) if spec.transposed else (N, K)
    check_operand(op, "weight", weight, spec.weight_dtype, *shape)
    require_adjacent(op, weight=weight)
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
    check_operand(op, "ids", ids, ids.dtype, "M")
    require(op, ids.dtype in (torch.int32, torch.int64), f"ids is {ids.dtype}, not int32 or int64")
    require_adjacent(op, ids=ids)
    require(op, rank == plan.spec.delta.max_rank, f"A has rank {rank}")
    check_y(op, plan, y, ids.shape[0])


def columns_of(spec: TritonSpec, blocks: Any) -> Any:
    return len(spec.delta.sizes) * spec.width * blocks


def blocks_of(spec: TritonSpec, bank: BankArgs) -> Any:
    return bank.slots.shape[0] if spec.by_request else bank.B.shape[0]


def gather(kernel: GeneratedKernel, spec: TritonSpec, w: Tensor, batch: LaunchArgs) -> Tensor:
    """Writes B into W' (N, …), or (…, N) where the spec is transposed, behind its K columns.
    Returns int32 (blocks, T): where B is not finite, by block and column tile; W' has 0 there."""
    bank = batch.bank
    blocks = blocks_of(spec, bank)
    tiles_n = sum(-(-size // kernel.tiles.block_n) for size in spec.delta.sizes)
    flags = torch.empty((blocks, tiles_n), dtype=torch.int32, device=w.device)
    strides = [w.stride(1), w.stride(0)] if spec.transposed else [w.stride(0), w.stride(1)]
    pointers = [bank.B, bank.ranks, bank.slots, w, flags]
    batch.launch(kernel, (tiles_n, blocks), [*pointers, bank.ranks.shape[0], blocks, *strides])
    return flags


def place(
    kernel: GeneratedKernel, spec: TritonSpec, x: Tensor, flags: Tensor, batch: LaunchArgs
) -> None:
    """Writes v into x' (M, …) behind x; NaN for rows of slots that `flags` marks."""
    bank, tiles = batch.bank, kernel.tiles
    grid = (batch.tiles(tiles.block_m), -(-columns_of(spec, 1) // tiles.block_r))
    pointers = [x, bank.A, bank.ranks, bank.scales, flags, *batch.pointers]
    scalars = batch.arguments(bank.ranks.shape[0], blocks_of(spec, bank), x.stride(0))
    batch.launch(kernel, grid, [*pointers, *scalars])


def _run_concat(
    x: Tensor, w: Tensor, bank: BankArgs, rows: int, kernel: int, launch: Launch
) -> None:
    _concat_fake(x, w, bank, rows, kernel)
    plan, M = plan_of(int(kernel)), x.shape[0]
    if guard_or_false(M == 0):
        return
    batch = LaunchArgs.of(M, bank, rows, plan.order, launch)
    behind_w, behind_x = plan.kernels.values()
    flags = gather(behind_w, plan.spec, w, batch)
    place(behind_x, plan.spec, x, flags, batch)


def _concat_fake(x, w, bank: BankArgs, rows, kernel) -> None:
    op = "triton_concat_"
    plan = checked_plan(op, kernel, (CONCAT,), bank, rows)
    spec, d = plan.spec, plan.spec.delta
    more = columns_of(spec, blocks_of(spec, bank))
    K, N = d.in_features, spec.out_features
    check_operand(op, "x'", x, d.x_dtype, "M", K + more)
    check_a(op, plan, bank.A)
    require_adjacent(op, x=x)
    shape = (K + more, N) if spec.transposed else (N, K + more)
    check_operand(op, "W'", w, d.x_dtype, *shape)


triton_linear = generated_op("linear", _run_linear, _linear_fake)
triton_delta_ = generated_op("delta_", _run_delta, _delta_fake, mutates_args=("y",))
triton_embedding_delta_ = generated_op(
    "embedding_delta_", _run_embedding_delta, _embedding_fake, mutates_args=("y",)
)
triton_concat_ = generated_op("concat_", _run_concat, _concat_fake, mutates_args=("x", "w"))
