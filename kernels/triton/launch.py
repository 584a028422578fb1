"""Launches of the generated Triton kernels.

They compute what lorafx.kernels.triton.source says. A launch freezes grid and tiles; kernels read
slots, ranks and numbers of rows on the device, so a captured launch stays right when they change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorafx.kernels.ops.op_library import BankArgs
from lorafx.kernels.triton.generated import GeneratedKernel, Launch
from lorafx.kernels.triton.source import TritonSpec


@dataclass(frozen=True)
class LaunchArgs:
    """The bank, the ownership of rows in the form that kernels take, and the launcher.

    Attributes:
        rows: rows a request, at most M: all rows alike is M rows of the first request.
        order: (count,) int32, the requests that have rows, sorted by slot; None: not sorted.
        count: requests that have rows.
        span: rows of one request, over all repetitions of the n requests in M.
    """

    M: Any
    bank: BankArgs
    rows: Any
    order: Tensor | None
    count: Any
    span: Any
    launch: Launch

    @classmethod
    def of(
        cls, M: Any, bank: BankArgs, rows: Any, kernel: GeneratedKernel | None, launch: Launch
    ) -> LaunchArgs:
        slots = bank.slots
        n = slots.shape[0]
        rows = torch.sym_min(rows, M)  # also keeps "all rows alike", 2⁶², out of 32-bit arithmetic
        count = torch.sym_min(n, _cdiv(M, rows))
        span = _cdiv(M, n * rows) * rows
        order = None
        if kernel is not None:
            order = torch.empty(count, dtype=torch.int32, device=slots.device)
            launch(kernel, (_cdiv(count, kernel.tiles.block_m),), (slots, order, count))
        return cls(M, bank, rows, order, count, span, launch)

    def tiles(self, block: int) -> Any:
        return _cdiv(self.M if self.order is None else self.count * self.span, block)

    def arguments(self, *tail: Any) -> list[Any]:
        sorting = [] if self.order is None else [self.span, self.count]
        return [self.M, self.bank.slots.shape[0], self.rows, *sorting, *tail]

    @property
    def pointers(self) -> list[Tensor]:
        return [t for t in (self.bank.slots, self.order) if t is not None]

    def planes(self, kernel: GeneratedKernel, spec: TritonSpec) -> Tensor:
        """Empty planes for shrink's v, (P, M, J·R) float32."""
        size = kernel.tiles.parts, self.M, spec.planes
        return torch.empty(size, dtype=torch.float32, device=self.bank.A.device)


def _cdiv(value: Any, by: Any) -> Any:
    return (value + by - 1) // by


def shrink(kernel: GeneratedKernel, spec: TritonSpec, x: Tensor, batch: LaunchArgs) -> Tensor:
    """v (P, M, J·R) float32 of x (M, K), by `shrink` or `shrink_rows`. Factors beyond a row's rank
    are not written and must not be read."""
    A, _, ranks, scales, _ = batch.bank
    tiles, v = kernel.tiles, batch.planes(kernel, spec)
    tall = batch.M if kernel.name == "shrink_rows" else batch.tiles(tiles.block_m) * tiles.lanes
    grid = (tall, _cdiv(spec.planes, tiles.block_r), tiles.parts)
    scalars = batch.arguments(ranks.shape[0], v.stride(0), x.stride(0))
    batch.launch(kernel, grid, [x, A, ranks, scales, *batch.pointers, v, *scalars])
    return v


def split(
    kernel: GeneratedKernel,
    spec: TritonSpec,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    batch: LaunchArgs,
) -> tuple[Tensor | None, Tensor]:
    """The base product's planes (Q, M, N) float32, and `shrink`'s v. A single plane is y: None."""
    A, _, ranks, scales, _ = batch.bank
    tiles, N = kernel.tiles, spec.out_features
    sums = None
    if tiles.split > 1:
        sums = torch.empty((tiles.split, batch.M, N), dtype=torch.float32, device=x.device)
    target = y if sums is None else sums
    v = batch.planes(kernel, spec)
    tiles_m = batch.tiles(tiles.block_m)
    shrinking = tiles.lanes * _cdiv(spec.planes, tiles.block_r) * tiles.parts
    grid = (tiles_m * (shrinking + _cdiv(N, tiles.block_n) * tiles.split),)
    strides = [v.stride(0), target.stride(0), x.stride(0), weight.stride(0)]
    scalars = batch.arguments(ranks.shape[0], tiles_m, *strides)
    batch.launch(kernel, grid, [x, weight, A, ranks, scales, *batch.pointers, target, v, *scalars])
    return sums, v


class Base(NamedTuple):
    """Operands of the product; "reduce" reads bias and `sums`, its planes, None if y holds it."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    sums: Tensor | None = None


def linear(
    kernel: GeneratedKernel,
    spec: TritonSpec,
    y: Tensor,
    v: Tensor,
    base: Base | None,
    batch: LaunchArgs,
) -> None:
    """Writes y (M, N), or adds to it where there is no base product ("expand"). v are shrink's
    planes."""
    B, ranks = batch.bank.B, batch.bank.ranks
    tiles = kernel.tiles
    pointers: list[Any] = []
    strides: list[Any] = []
    if base is not None:
        x, weight, bias, sums = base
        if kernel.name != "reduce":
            pointers += [x, weight]
            strides += [x.stride(0), weight.stride(0)]
        elif sums is not None:
            pointers.append(sums)
            strides.append(sums.stride(0))
        pointers += [] if bias is None else [bias]
    pointers += [v, B, ranks]
    tiles_m = batch.tiles(tiles.block_m)
    tiles_n = sum(_cdiv(size, tiles.block_n) for size in spec.delta.sizes)
    scalars = batch.arguments(ranks.shape[0], tiles_m, v.stride(0), *strides, y.stride(0))
    batch.launch(kernel, (tiles_m * tiles_n,), [*pointers, *batch.pointers, y, *scalars])


def expand_rows(
    kernel: GeneratedKernel, spec: TritonSpec, y: Tensor, v: Tensor, batch: LaunchArgs
) -> None:
    B, ranks = batch.bank.B, batch.bank.ranks
    tiles_n = sum(_cdiv(size, kernel.tiles.block_n) for size in spec.delta.sizes)
    scalars = batch.arguments(ranks.shape[0], v.stride(0), y.stride(0))
    batch.launch(kernel, (batch.M, tiles_n), [v, B, ranks, *batch.pointers, y, *scalars])


def embedding_rows(
    kernel: GeneratedKernel, spec: TritonSpec, y: Tensor, ids: Tensor, batch: LaunchArgs
) -> None:
    """Adds scale · A[s, ids, :r] B[s, :r] into y (M, N); ids outside the table add nothing."""
    A, B, ranks, scales, _ = batch.bank
    tiles_n = _cdiv(spec.delta.columns, kernel.tiles.block_n)
    scalars = batch.arguments(ranks.shape[0], A.shape[1], *A.stride()[:2], y.stride(0))
    pointers = [ids, A, B, ranks, scales, *batch.pointers, y]
    batch.launch(kernel, (batch.M, tiles_n), [*pointers, *scalars])
