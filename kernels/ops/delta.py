"""The LoRA delta in plain aten, on any device: the reference of every generated kernel.

    v[m]           = scales[s, i] · A[s, :r, K_i] x[m]    s = slot of row m, r = ranks[s, i],
                                                          K_i = i·K : (i + 1)·K
    y[m, columns] += v[m] B[s, :r, offset : offset + size]

Embedding: A[s, id, :r] stands for A x. Sums are in float32 for 16-bit and 32-bit tensors and in
float64 for float64; y is read and rounded once. Rows whose slot is negative keep their bits. All
functions raise as `row_slots` and `groups` do.

DoRA rescales the result (`rescaled`; the pass `rescale` writes the same into the graph):

    y[m, n] ← y[m, n] + G[s, n] · (y[m, n] − c[n])

y = W x + s·B A x + c holds the low-rank delta and the bias c, and G = m / ‖W + s·B A‖ − 1 by
output, so that y becomes c + m / ‖W + s·B A‖ · (W x + s·B A x).

On a CPU rows are grouped by the slots that are present, so work grows with the active adapters. On
an accelerator that grouping would make the host wait, so all slots are multiplied and masked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lorafx.errors import BatchError, ProvenanceError
from lorafx.kernels.ops.op_library import BankArgs, Ranges


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def row_slots(slots: Tensor, rows: int, count: int) -> Tensor:
    """The slot of each of `count` rows, slots[(m // rows) % n], int32. Raises ProvenanceError if
    rows is 0 (not proved) and slots differ, BatchError for rows without slots."""
    n = slots.shape[0]
    if n == 0 or count == 0:
        if count:
            raise BatchError(f"{count} rows but an empty slots tensor; give one slot per request")
        return slots.new_empty(0)
    if rows == 0:
        if n > 1 and bool((slots != slots[0]).any()):
            raise ProvenanceError(
                "a mixed batch reached a site whose row ownership is not proved; give all "
                "rows the same adapter, or see explain() for the reason"
            )
        return slots[:1].expand(count)
    return slots[(torch.arange(count, device=slots.device) // rows) % n]


def groups(owner: Tensor, capacity: int) -> Iterator[tuple[int, Tensor]]:
    """(slot, its row indices int64) for each slot ≥ 0 in owner (M,); BatchError at `capacity`."""
    slots, counts = torch.unique(owner, return_counts=True)
    indices = owner.argsort(stable=True).split(counts.tolist())
    for slot, index in zip(slots.tolist(), indices, strict=True):
        if slot >= capacity:
            raise BatchError(f"slot {slot} in a batch, but the bank has {capacity} slots")
        if slot >= 0:
            yield slot, index


def _row_index(index: Tensor, leading: Sequence[int]) -> tuple[Tensor, ...]:
    """Indices into a tensor (*leading, F), of any strides, of the rows with these numbers."""
    return (index,) if len(leading) == 1 else tuple(torch.unravel_index(index, tuple(leading)))


def _masked_b(B: Tensor, rank: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """B (S·R, N) with zeros beyond each slot's rank, and the mask (S, R) of the factors in use."""
    live = torch.arange(B.shape[1], device=B.device) < rank.unsqueeze(-1)
    return torch.where(live.unsqueeze(-1), B, 0).to(dtype).flatten(0, 1), live


def _masked_v(v: Tensor, owner: Tensor, live: Tensor, scale: Tensor) -> Tensor:
    """scale · v (M, S, R) where the row has the slot and uses the factor, else 0; (M, S·R)."""
    has_slot = owner.unsqueeze(-1) == torch.arange(v.shape[1], device=v.device)
    keep = has_slot.unsqueeze(-1) & live
    return torch.where(keep, v * scale.to(v.dtype).unsqueeze(-1), 0).flatten(1)


def add_linear_delta(
    y: Tensor, x: Tensor, bank: BankArgs, ranges: Ranges, rows: int, *, grouped: bool | None = None
) -> None:
    """Add the delta of each range to y (..., Σsizes) in place; x is (..., K). Strides are
    arbitrary. `grouped` overrides the choice by device: to group rows by slot, or to mask."""
    x, y = torch.atleast_2d(x), torch.atleast_2d(y)  # views
    A, B, ranks, scales, slots = bank
    count = x.shape[:-1].numel()
    owner = row_slots(slots, rows, count)
    if count == 0:
        return
    acc, K, start = accumulation_dtype(x, y), x.shape[-1], 0
    parts = []
    for i, offset, size in zip(*ranges, strict=True):
        columns = slice(offset, offset + size)
        parts.append((i, slice(i * K, (i + 1) * K), columns, y[..., start : start + size]))
        start += size
    if not (x.device.type == "cpu" if grouped is None else grouped):
        x = x.reshape(count, x.shape[-1]).to(acc)
        for i, features, columns, part in parts:
            b, live = _masked_b(B[:, :, columns], ranks[:, i], acc)
            v = (x @ A[..., features].flatten(0, 1).to(acc).T).unflatten(-1, A.shape[:2])
            delta = _masked_v(v, owner, live, scales[:, i]) @ b
            part.copy_(part.to(acc) + delta.view(part.shape))
        return
    rank_table, scale_table = ranks.tolist(), scales.tolist()
    for slot, index in groups(owner, A.shape[0]):
        xs, y_index = x[_row_index(index, x.shape[:-1])].to(acc), _row_index(index, y.shape[:-1])
        for i, features, columns, part in parts:
            r = rank_table[slot][i]
            v = xs @ A[slot, :r, features].to(acc).T * scale_table[slot][i]
            part[y_index] = (part[y_index].to(acc) + v @ B[slot, :r, columns].to(acc)).to(y.dtype)


def add_embedding_delta(
    y: Tensor, ids: Tensor, bank: BankArgs, rows: int, *, grouped: bool | None = None
) -> None:
    """Add the delta of an embedding to y (..., N) in place; ids is (...). Strides are arbitrary."""
    ids, y = torch.atleast_1d(ids), torch.atleast_2d(y)  # views
    A, B, ranks, scales, slots = bank
    count = ids.numel()
    owner = row_slots(slots, rows, count)
    if count == 0:
        return
    acc = accumulation_dtype(A, y)
    if not (ids.device.type == "cpu" if grouped is None else grouped):
        b, live = _masked_b(B, ranks[:, 0], acc)
        v = A[:, ids.reshape(-1)].transpose(0, 1).to(acc)
        delta = _masked_v(v, owner, live, scales[:, 0]) @ b
        y.copy_(y.to(acc) + delta.view(y.shape))
        return
    rank_table, scale_table = ranks.tolist(), scales.tolist()
    for slot, index in groups(owner, A.shape[0]):
        r, y_index = rank_table[slot][0], _row_index(index, y.shape[:-1])
        v = A[slot, ids[_row_index(index, ids.shape)], :r].to(acc) * scale_table[slot][0]
        y[y_index] = (y[y_index].to(acc) + v @ B[slot, :r].to(acc)).to(y.dtype)


def rescaled(
    y: Tensor,
    gains: Tensor | None,
    addend: Tensor | None,
    slots: Tensor,
    rows: int,
    offsets: Sequence[int],
    sizes: Sequence[int],
    shifts: Tensor | None = None,
) -> Tensor:
    """y, rescaled by the columns [offset, offset + size) of gains (S, ΣN), plus those of shifts (S,
    ΣN); either may be None."""
    owner = row_slots(slots, rows, y.shape[:-1].numel()).view(y.shape[:-1])

    def columns(table: Tensor) -> Tensor:
        return torch.cat([table[:, o : o + n] for o, n in zip(offsets, sizes, strict=True)], 1)

    if gains is not None:
        y = rescaled_rows(y, columns(gains), addend, owner)
    return y if shifts is None else shifted_rows(y, columns(shifts), owner)


def rescaled_rows(y: Tensor, gains: Tensor, addend: Tensor | None, owner: Tensor) -> Tensor:
    """y (..., N) rescaled by gains (S, N) of its rows' slots; base rows keep their bits."""
    gain = gains[owner]  # -1 reads the last slot, masked below
    wide = y.to(accumulation_dtype(y))
    product = wide if addend is None else wide - addend
    live = (owner >= 0).unsqueeze(-1) & (gain != 0)
    return torch.where(live, (wide + gain * product).to(y.dtype), y)


def shifted_rows(y: Tensor, shifts: Tensor, owner: Tensor) -> Tensor:
    """y (..., N) + shifts[s] of shifts (S, N), biases; base rows keep their bits."""
    shift = shifts[owner]
    live = (owner >= 0).unsqueeze(-1) & (shift != 0)
    return torch.where(live, (y.to(accumulation_dtype(y)) + shift).to(y.dtype), y)
