"""The strategy "concat": one product of the vendor's for a longer x and a longer W.

    lorafx::triton_concat_    v behind the columns of x' = [x | …], B behind those of W' = [W | …]

    y = x' W'ᵀ + b after triton_concat_(x', W', …), which launches

    gather   W'[column, d-th block of its sibling, r] = B[slot of block d, r, column]
    place    x'[m, block of m, r] = scale · Σ_k A[slot of m, sibling, r, k] x[m, k]

Arguments are those of lorafx.kernels.triton.triton_ops, and so is the way an op runs: its launches
on a GPU, Triton's interpreter on a CPU. The columns are those of lorafx.kernels.triton.longer; all
of them are written at every launch. v is rounded to x's type before it is multiplied by B, which is
of that type already:

    |ŷ - y| ≤ u |y| + u Σ_k |v_k| |B_k| + (2K + r + 8) 2⁻²⁴ |y|₁

with u = 2⁻⁸ for bfloat16 and 2⁻¹¹ for float16. The columns of other rows' blocks are 0 in x', and
what W' has there is a number always: where B of an adapter is none, its rows are NaN, and nobody
else's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lorafx.kernels.ops.bank_arguments import BankArgs
from lorafx.kernels.ops.delta import row_slots
from lorafx.kernels.ops.op_checks import require
from lorafx.kernels.triton.generated_op import generated_op
from lorafx.kernels.triton.launchers import Launch
from lorafx.kernels.triton.longer import width_of
from lorafx.kernels.triton.triton_build import CONCAT, LaunchPlan, plan_of
from lorafx.kernels.triton.triton_cache import GeneratedKernel
from lorafx.kernels.triton.triton_checks import checked_plan, require_adjacent
from lorafx.kernels.triton.triton_launch import LaunchArgs
from lorafx.kernels.triton.triton_source import TritonSpec
from lorafx.torch_internals.symbols import guard_or_false


def columns_of(spec: TritonSpec, blocks: Any) -> Any:
    """Columns behind x and W where each sibling has so many blocks."""
    return len(spec.delta.sizes) * width_of(spec.delta.max_rank) * blocks


def blocks_of(spec: TritonSpec, bank: BankArgs) -> Any:
    """Blocks of each sibling: one for each request, or for each slot of the bank."""
    assert spec.longer is not None
    return bank.slots.shape[0] if spec.longer.requests else bank.B.shape[0]


def gather(
    kernel: GeneratedKernel,
    spec: TritonSpec,
    w: Tensor,
    batch: LaunchArgs,
) -> Tensor:
    """Writes B into W' (N, …), or (…, N) where the spec is transposed, behind its K columns.

    Returns:
        (blocks, T) int32: whether B of a block has what is no number in each of T column tiles.
        W' has 0 in its place.
    """
    bank = batch.bank
    blocks = blocks_of(spec, bank)
    tiles_n = sum(-(-size // kernel.tiles.block_n) for size in spec.delta.sizes)
    flags = torch.empty((blocks, tiles_n), dtype=torch.int32, device=w.device)
    strides = [w.stride(1), w.stride(0)] if spec.transposed else [w.stride(0), w.stride(1)]
    pointers = [bank.B, bank.ranks, bank.slots, w, flags]
    scalars = [bank.ranks.shape[0], blocks, *strides]
    batch.launch(kernel, (tiles_n, blocks), [*pointers, *scalars])
    return flags


def place(
    kernel: GeneratedKernel,
    spec: TritonSpec,
    x: Tensor,
    flags: Tensor,
    batch: LaunchArgs,
) -> None:
    """Writes v into x' (M, …) behind x; NaN for rows of slots that `flags` has something of."""
    bank, tiles = batch.bank, kernel.tiles
    columns = columns_of(spec, 1)
    grid = (batch.tiles(tiles.block_m), -(-columns // tiles.block_r))
    pointers = [x, bank.A, bank.ranks, bank.scales, flags, *batch.pointers]
    scalars = batch.arguments(bank.ranks.shape[0], blocks_of(spec, bank), x.stride(0))
    batch.launch(kernel, grid, [*pointers, *scalars])


def longer_reference(
    spec: TritonSpec, x: Tensor, weight: Tensor, bank: BankArgs, rows: int
) -> tuple[Tensor, Tensor]:
    """x' and W' that `place` and `gather` leave for x (M, K) and W (N, K), where all factors are
    numbers; v is summed in float32 and rounded once."""
    d, blocks, width = spec.delta, blocks_of(spec, bank), width_of(spec.delta.max_rank)
    longer_x, longer_w = (pad(tensor, (0, columns_of(spec, blocks))) for tensor in (x, weight))
    A, B, ranks, scales, slots = bank
    requests = (torch.arange(x.shape[0]) // rows % slots.shape[0]).tolist()
    by_request = spec.longer is not None and spec.longer.requests
    start, K = 0, d.in_features
    for j, (i, offset, size) in enumerate(zip(d.siblings, d.offsets, d.sizes, strict=True)):
        first = K + j * blocks * width
        for block in range(blocks):
            slot = int(slots[block]) if by_request else block
            r = int(ranks[slot, i]) if slot >= 0 else 0
            at = first + block * width
            longer_w[start : start + size, at : at + r] = B[slot, :r, offset : offset + size].T
        for m, slot in enumerate(row_slots(slots, rows, x.shape[0]).tolist()):
            r = int(ranks[slot, i]) if slot >= 0 else 0
            at = first + (requests[m] if by_request else max(slot, 0)) * width
            v = scales[slot, i] * (A[slot, :r, i * K : (i + 1) * K].float() @ x[m].float())
            longer_x[m, at : at + r] = v.to(x.dtype)
        start += size
    return longer_x, longer_w


def _run_concat(
    x: Tensor,
    w: Tensor,
    bank: BankArgs,
    rows: int,
    kernel: int,
    launch: Launch,
) -> None:
    """Writes the columns behind x in x' (M, K + …) and behind W in W' (N, K + …), in place.

    Raises:
        LoweringError: an argument that `kernel` was not made for.
    """
    plan = _concat_plan(x, w, bank, rows, kernel)
    spec, M = plan.spec, x.shape[0]
    if guard_or_false(M == 0):
        return
    batch = LaunchArgs.of(M, bank, rows, plan.order, launch)
    behind_w, behind_x = plan.kernels.values()
    flags = gather(behind_w, spec, w, batch)
    place(behind_x, spec, x, flags, batch)


def _concat_plan(x, w, bank: BankArgs, rows, kernel) -> LaunchPlan:
    plan = checked_plan("triton_concat_", kernel, (CONCAT,), bank, rows)
    d = plan.spec.delta
    more = columns_of(plan.spec, blocks_of(plan.spec, bank))
    K, N = d.in_features, plan.spec.out_features
    require(
        "triton_concat_",
        x.dim() == 2 and x.shape[1] == K + more and x.dtype == d.x_dtype,
        f"x' is {x.dtype} {tuple(x.shape)}, the kernel's {d.x_dtype} (M, {K} + {more})",
    )
    require(
        "triton_concat_",
        bank.A.shape[1] == d.max_rank and bank.A.shape[2] >= (max(d.siblings) + 1) * K,
        f"A is {tuple(bank.A.shape)}, not the kernel's bank's",
    )
    require_adjacent("triton_concat_", x=x)
    require("triton_concat_", w.dim() == 2, f"W' is a matrix, not {w.dim()}-d")
    have, long = w.shape[::-1] if plan.spec.transposed else w.shape
    require(
        "triton_concat_",
        have == N and long == K + more and w.dtype == d.x_dtype,
        f"W' is {w.dtype} {tuple(w.shape)}, the kernel's {d.x_dtype} with {N} rows of {K} + {more}",
    )
    return plan


def _concat_fake(x, w, bank: BankArgs, rows, kernel) -> None:
    _concat_plan(x, w, bank, rows, kernel)


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
    """x Wᵀ + b and the deltas, op by op, as `lower` has it in graphs.

    Raises:
        LoweringError: an argument that `kernel` was not made for.
    """
    spec = plan_of(kernel).spec
    more = (0, columns_of(spec, blocks_of(spec, bank)))
    x = pad(x, more)
    right = pad(weight.T if transposed else weight, more).T
    w = right if transposed else right.T
    torch.ops.lorafx.triton_concat_(x, w, *bank, rows, kernel)
    return x @ right if bias is None else torch.addmm(bias, x, right)
