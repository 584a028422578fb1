"""`lorafx::grouped_site`, y + delta of a product with blocks of a weight.

A use cuts W (N, K) into G blocks, one per group, each a regular grid of W's entries:

    W_g[j, c] = W[o(g, j), i(g, c)]     o(g, j) = o₀ + g·o₁ + j·o₂     i(g, c) = i₀ + g·i₁ + c·i₂

and multiplies the rows of group g by it, over `in` or over `out`:

    over in    y_g = x_g W_gᵀ    y_g[m, j] += s Σ_r (Σ_c x_g[m, c] A[r, i(g, c)]) B[r, o(g, j)]
    over out   y_g = x_g W_g     y_g[m, c] += s Σ_r (Σ_j x_g[m, j] B[r, o(g, j)]) A[r, i(g, c)]

That is a block-diagonal projection (over in), the value half of an absorbed `kv_b_proj` (over in)
and its key half (over out). x (..., F) and y (..., F') have the same leading sizes; index p of
their dimension `group_dim` is in group p mod G, so that a batch of matrices (B·G, M, F) is served
as well as (G, B·M, F). `rows` counts all leading dimensions, as for the other ops.

Sums are in float32 (float64 for float64 tensors), y is read and rounded once. On a CPU only rows
and ranks of slots that are present are computed; on an accelerator, where reading the slots would
make the host wait, all slots are multiplied and masked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorafx.kernels.ops.delta import accumulation_dtype, groups, row_slots
from lorafx.kernels.ops.op_library import (
    BANK,
    RANGES,
    BankArgs,
    Ranges,
    check_linear,
    check_rows,
    define,
    require,
)


class Blocks(NamedTuple):
    """How a use cuts W into `groups` blocks: out_steps are (o₀, o₁, o₂), in_steps (i₀, i₁, i₂)."""

    groups: int
    out_steps: Sequence[int]
    in_steps: Sequence[int]
    over_out: bool


def grouped_site(
    x: Tensor, y: Tensor, bank: BankArgs, ranges: Ranges, rows: int, group_dim: int, blocks: Blocks
) -> Tensor:
    """y (..., F') + delta for x (..., F), a new contiguous tensor of y's dtype."""
    _check(x, y, bank, ranges, rows, group_dim, blocks)
    out = y.clone(memory_format=torch.contiguous_format)
    if out.numel():
        add_grouped_delta(out, x, bank, ranges, rows, group_dim, blocks)
    return out


def grouped_site_fake(x, y, bank: BankArgs, ranges: Ranges, rows, group_dim, blocks: Blocks):
    _check(x, y, bank, ranges, rows, group_dim, blocks)
    return y.new_empty(y.shape)


def _check(x, y, bank, ranges, rows, group_dim, blocks: Blocks) -> None:
    op, sizes = "grouped_site", ranges.sizes
    K = bank.A.shape[2] // max(bank.ranks.shape[1], 1)
    check_linear(op, x, sum(sizes), bank, ranges, K)  # the bank against the site as a whole
    require(op, x.dim() == y.dim() >= 2, f"x is {x.dim()}-d and y {y.dim()}-d")
    require(op, x.is_floating_point(), "x is a floating-point tensor")
    check_rows(op, x.shape[:-1], y.shape[:-1], rows)
    require(op, 0 <= group_dim < x.dim() - 1, f"group_dim {group_dim} of a {x.dim()}-d x")
    require(op, blocks.groups >= 1, f"{blocks.groups} groups")
    outs, ins = (x, y) if blocks.over_out else (y, x)
    for name, steps, count, limit in (
        ("out", blocks.out_steps, outs.shape[-1], sum(sizes)),
        ("in", blocks.in_steps, ins.shape[-1], K),
    ):
        start, group, step = steps
        last = start + (blocks.groups - 1) * group + (count - 1) * step
        require(op, min(steps) >= 0, f"negative {name} steps {steps}")
        require(op, last < limit, f"blocks reach {name} index {last} of {limit}")


def add_grouped_delta(
    y: Tensor,
    x: Tensor,
    bank: BankArgs,
    ranges: Ranges,
    rows: int,
    group_dim: int,
    blocks: Blocks,
    *,
    by_slot: bool | None = None,
) -> None:
    """Add the delta to y in place; `by_slot` overrides the choice by device."""
    A, B, ranks, scales, slots = bank
    siblings, offsets, sizes = ranges
    owner = row_slots(slots, rows, x.shape[:-1].numel()).view(x.shape[:-1])
    acc = accumulation_dtype(x, y)
    x, target, owner = (_groups_first(t, group_dim, blocks) for t in (x, y, owner[..., None]))
    x, owner = (t.reshape(blocks.groups, -1, t.shape[-1]) for t in (x, owner))
    owner = owner[..., 0]
    total = target.reshape(blocks.groups, -1, y.shape[-1]).to(acc)
    outs = (x if blocks.over_out else y).shape[-1]
    ins = (y if blocks.over_out else x).shape[-1]

    def factors(slot: int, rank_of: Sequence[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(sibling, A_g, B_g) of a slot: (G or 1, r, ins) and (G or 1, r, outs)."""
        start, K = 0, A.shape[2] // ranks.shape[1]
        for i, offset, size in zip(siblings, offsets, sizes, strict=True):
            a = A[slot, : rank_of[i], i * K : (i + 1) * K]
            b = B[slot, : rank_of[i], offset : offset + size]
            if len(siblings) > 1:  # a block may cross parts of the site
                b = torch.nn.functional.pad(b, (start, sum(sizes) - start - size))
            a = _block_columns(a, blocks.in_steps, ins, blocks)
            yield i, a, _block_columns(b, blocks.out_steps, outs, blocks)
            start += size

    def delta(rows_of_x: Tensor, a: Tensor, b: Tensor, scale: Tensor | float) -> Tensor:
        first, second = (b, a) if blocks.over_out else (a, b)
        return rows_of_x @ first.to(acc).mT * scale @ second.to(acc)

    if x.device.type == "cpu" if by_slot is None else by_slot:
        rank_table, scale_table = ranks.tolist(), scales.tolist()
        for slot, _ in groups(owner.flatten(), A.shape[0]):
            in_slot = owner == slot
            index = in_slot.any(0).nonzero().squeeze(-1)
            xs, keep = x[:, index].to(acc), in_slot[:, index, None]
            for i, a, b in factors(slot, rank_table[slot]):
                part = delta(xs, a, b, scale_table[slot][i])
                total[:, index] += torch.where(keep, part, 0)
    else:
        full_ranks = [B.shape[1]] * ranks.shape[1]
        for slot in range(A.shape[0]):
            keep = (owner == slot)[..., None]
            for i, a, b in factors(slot, full_ranks):
                live = (torch.arange(B.shape[1], device=B.device) < ranks[slot, i])[:, None]
                a, b = torch.where(live, a, 0), torch.where(live, b, 0)
                total += torch.where(keep, delta(x.to(acc), a, b, scales[slot, i].to(acc)), 0)
    if total.data_ptr() != target.data_ptr():  # a copy of y, or of another dtype
        target.copy_(total.view(target.shape))


def _groups_first(tensor: Tensor, group_dim: int, blocks: Blocks) -> Tensor:
    """(..., T·G, ..., F) as a view (G, ..., T, ..., F)."""
    count = tensor.shape[group_dim] // blocks.groups
    split = tensor.unflatten(group_dim, (count, blocks.groups))
    return split.movedim(group_dim + 1, 0)


def _block_columns(factor: Tensor, steps: Sequence[int], count: int, blocks: Blocks) -> Tensor:
    """The columns of factor (r, F) in the block of each group, a view (G, r, count)."""
    start, group, step = steps
    along, across = factor.stride()
    sizes = (blocks.groups if group else 1, factor.shape[0], count)
    first = factor.storage_offset() + start * across
    return factor.as_strided(sizes, (group * across, along, step * across), first)


define(
    f"grouped_site(Tensor x, Tensor y, {BANK}, {RANGES}, SymInt rows, int group_dim, int groups,"
    " int[] out_steps, int[] in_steps, bool over_out) -> Tensor",
    grouped_site,
    grouped_site_fake,
)
