"""The strategy "concat": one product of the vendor's for a longer x and a longer W.

    x' = [ x | v of each sibling ]      W' = [ W | B of each sibling ]      y = x' W'ᵀ + b

`lorafx::triton_concat_(x', W', …)` writes the columns behind x and W, all of them at every launch:

    gather   W'[column, d-th block of its sibling, r] = B[slot of block d, r, column]
    place    x'[m, block of m, r] = scale · Σ_k A[slot of m, sibling, r, k] x[m, k]

A sibling has a block of `TritonSpec.width` columns for each slot of the bank or for each request. A
row's v is in the block of its slot, the rest of its columns are 0, and W' is 0 in the columns of
other siblings. v is rounded to x's type before it is multiplied by B, which is of that type:

    |ŷ - y| ≤ u |y| + u Σ_k |v_k| |B_k| + (2K + r + 8) 2⁻²⁴ |y|₁

with u = 2⁻⁸ for bfloat16 and 2⁻¹¹ for float16. W' is finite in the blocks of other rows: where an
adapter's B is not, the rows of that adapter alone are NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lorafx.kernels.ops.op_checks import require
from lorafx.kernels.ops.op_library import BankArgs
from lorafx.kernels.triton.build import CONCAT, plan_of
from lorafx.kernels.triton.generated import GeneratedKernel
from lorafx.kernels.triton.launch import LaunchArgs
from lorafx.kernels.triton.launch_checks import check_a, checked_plan, require_adjacent
from lorafx.kernels.triton.launchers import Launch, generated_op
from lorafx.kernels.triton.source import TritonSpec
from lorafx.torch_internals.symbols import guard_or_false


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
    require(
        op,
        x.dim() == 2 and x.shape[1] == K + more and x.dtype == d.x_dtype,
        f"x' is {x.dtype} {tuple(x.shape)}, the kernel's {d.x_dtype} (M, {K} + {more})",
    )
    check_a(op, plan, bank.A)
    require_adjacent(op, x=x)
    require(op, w.dim() == 2, f"W' is a matrix, not {w.dim()}-d")
    have, long = w.shape[::-1] if spec.transposed else w.shape
    require(
        op,
        have == N and long == K + more and w.dtype == d.x_dtype,
        f"W' is {w.dtype} {tuple(w.shape)}, the kernel's {d.x_dtype} with {N} rows of {K} + {more}",
    )


triton_concat_ = generated_op("concat_", _run_concat, _concat_fake, mutates_args=("x", "w"))


def concat_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bank: BankArgs,
    rows: int,
    kernel: int,
    *,
    transposed: bool = False,
) -> Tensor:
    spec = plan_of(kernel).spec
    more = (0, columns_of(spec, blocks_of(spec, bank)))
    x = pad(x, more)
    right = pad(weight.T if transposed else weight, more).T
    torch.ops.lorafx.triton_concat_(x, right if transposed else right.T, *bank, rows, kernel)
    return x @ right if bias is None else torch.addmm(bias, x, right)
