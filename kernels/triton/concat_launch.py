"""Launches of the kernels that make x and W longer, each beside its torch reference.

    gather   W'[column, d-th block of its sibling, r] = B[slot of block d, r, column]
    place    x'[m, block of m, r] = scale · Σ_k A[slot of m, sibling, r, k] x[m, k]

The columns are those of lorafx.kernels.triton.longer; all of them are written at every launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorafx.kernels.ops.bank_arguments import BankArgs
from lorafx.kernels.ops.delta import row_slots
from lorafx.kernels.triton.longer import ConcatLayout
from lorafx.kernels.triton.triton_cache import GeneratedKernel
from lorafx.kernels.triton.triton_launch import LaunchArgs
from lorafx.kernels.triton.triton_source import TritonSpec


def layout_of(spec: TritonSpec) -> ConcatLayout:
    """Where the columns of a node by a strategy that makes x and W longer lie."""
    assert spec.longer is not None
    return ConcatLayout.of(spec.delta, spec.longer)


def blocks_of(spec: TritonSpec, bank: BankArgs) -> Any:
    """Blocks of each sibling: one for each request, or for each slot of the bank."""
    assert spec.longer is not None
    return bank.slots.shape[0] if spec.longer.requests else bank.B.shape[0]


def gather(
    kernel: GeneratedKernel,
    spec: TritonSpec,
    w: Tensor,
    first: int,
    row: int,
    batch: LaunchArgs,
) -> Tensor:
    """Writes B into W' (N, …), or (…, N) where the spec is transposed, around the K columns from
    `first` on, in the N rows from `row` on.

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
    scalars = [bank.ranks.shape[0], blocks, first, row, *strides]
    batch.launch(kernel, (tiles_n, blocks), [*pointers, *scalars])
    return flags


def place(
    kernel: GeneratedKernel,
    spec: TritonSpec,
    x: Tensor,
    flags: Tensor,
    batch: LaunchArgs,
) -> None:
    """Writes v into x' (M, …) around x; NaN for rows of slots that `flags` has something of."""
    bank, layout, tiles = batch.bank, layout_of(spec), kernel.tiles
    blocks = blocks_of(spec, bank)
    columns = len(spec.delta.sizes) * layout.width
    grid = (batch.tiles(tiles.block_m), -(-columns // tiles.block_r))
    pointers = [x, bank.A, bank.ranks, bank.scales, flags, *batch.pointers]
    scalars = batch.arguments(bank.ranks.shape[0], blocks, layout.columns(blocks)[0], x.stride(0))
    batch.launch(kernel, grid, [*pointers, *scalars])


def longer_reference(
    spec: TritonSpec, x: Tensor, weight: Tensor, bank: BankArgs, rows: int
) -> tuple[Tensor, Tensor]:
    """x' and W' that `place` and `gather` leave for x (M, K) and W (N, K), where all factors are
    numbers; v is summed in float32 and rounded once."""
    d, layout, blocks = spec.delta, layout_of(spec), blocks_of(spec, bank)
    left, right = layout.columns(blocks)
    longer_x = torch.nn.functional.pad(x, (left, right))
    longer_w = torch.nn.functional.pad(weight, (left, right))
    A, B, ranks, scales, slots = bank
    requests = (torch.arange(x.shape[0]) // rows % slots.shape[0]).tolist()
    by_request = spec.longer is not None and spec.longer.requests
    start, K = 0, d.in_features
    for place, i, offset, size in zip(layout.places, d.siblings, d.offsets, d.sizes, strict=True):
        first = place * blocks * layout.width + (0 if place < layout.left else d.in_features)
        for block in range(blocks):
            slot = int(slots[block]) if by_request else block
            r = int(ranks[slot, i]) if slot >= 0 else 0
            at = first + block * layout.width
            longer_w[start : start + size, at : at + r] = B[slot, :r, offset : offset + size].T
        for m, slot in enumerate(row_slots(slots, rows, x.shape[0]).tolist()):
            r = int(ranks[slot, i]) if slot >= 0 else 0
            at = first + (requests[m] if by_request else max(slot, 0)) * layout.width
            v = scales[slot, i] * (A[slot, :r, i * K : (i + 1) * K].float() @ x[m].float())
            longer_x[m, at : at + r] = v.to(x.dtype)
        start += size
    return longer_x, longer_w
