"""Rows of a weight that an adapter replaces, in plain aten.

    linear      y[m, n] ← x[m] · own[i, t] + own_bias[i, t]     n = own_at[i, t], t < count
    embedding   y[m]    ← own[i, t]                             t = own_at[i, id of m], t ≥ 0

with i, count = own_table[s], s the slot of row m. A slot replaces all rows of the weight (a module
that was trained as a whole), some (tokens that were trained), or none, i = −1. Rows of other slots
and base rows keep y, bit for bit. The delta of the same site is added to the result.

A linear visits the slots that are present, for which the host waits if slots are on an accelerator:
a product with the weight of every slot would cost more than the wait.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lorafx.kernels.ops.delta import groups, row_slots
from lorafx.kernels.ops.op_library import check_rows, define, require


class OwnRows(NamedTuple):
    """The rows that M of the adapters in S slots have in place of the weight's.

    own (M, T, K), in the dtype of the weight: the rows. own_at, int32: for a linear (M, T), the
    output that each row computes; for an embedding (M, V), the row of each id, −1 for the base's.
    own_table, int32 (S, 2): the index of a slot among the M, −1 for none, and its number of rows.
    own_bias (M, T): the bias of a linear for each row.
    """

    own: Tensor | None = None
    own_at: Tensor | None = None
    own_table: Tensor | None = None
    own_bias: Tensor | None = None


#: The schema of these arguments, which are absent if the bank has no room for such rows.
OWN_ROWS = ", ".join(f"Tensor? {name}=None" for name in OwnRows._fields)


def own_linear(
    x: Tensor,
    y: Tensor,
    own: Tensor,
    own_at: Tensor,
    own_table: Tensor,
    own_bias: Tensor,
    slots: Tensor,
    rows: int,
) -> Tensor:
    """A contiguous copy of y (..., N) with the outputs of x (..., K) that adapters replace."""
    own_linear_fake(x, y, own, own_at, own_table, own_bias, slots, rows)
    out = y.clone(memory_format=torch.contiguous_format)
    count, columns = x.shape[:-1].numel(), y.shape[-1]
    x, flat = x.reshape(count, x.shape[-1]), out.view(count, columns)
    table = own_table.tolist()
    dtype = torch.promote_types(x.dtype, own.dtype)
    for slot, index in groups(row_slots(slots, rows, count), len(table)):
        i, size = table[slot]
        if i < 0:
            continue
        weight, bias = own[i, :size].to(dtype), own_bias[i, :size].to(dtype)
        outputs = torch.nn.functional.linear(x[index].to(dtype), weight, bias).to(y.dtype)
        if size == columns:
            flat[index] = outputs
        else:
            flat[index[:, None], own_at[i, :size].long()] = outputs
    return out


def own_linear_fake(x, y, own, own_at, own_table, own_bias, slots, rows):
    op = "own_linear"
    require(op, own.dim() == 3 and own.shape[2] == x.shape[-1], "own is (adapters, rows, K)")
    require(op, own.shape[1] <= y.shape[-1], f"{own.shape[1]} rows for {y.shape[-1]} outputs")
    for name, tensor in (("own_at", own_at), ("own_bias", own_bias)):
        require(op, tensor.shape == own.shape[:2], f"{name} is (adapters, rows)")
    require(op, own_table.shape[1:] == (2,), "own_table is (slots, 2)")
    check_rows(op, x.shape[:-1], y.shape[:-1], rows)
    return y.new_empty(y.shape)


def own_embedding(
    ids: Tensor, y: Tensor, own: Tensor, own_at: Tensor, own_table: Tensor, slots: Tensor, rows: int
) -> Tensor:
    """A contiguous copy of y (*ids.shape, N) with the rows that adapters replace."""
    own_embedding_fake(ids, y, own, own_at, own_table, slots, rows)
    owner = row_slots(slots, rows, ids.numel()).view(ids.shape).long()
    entry = torch.where(owner >= 0, own_table[owner.clamp(min=0), 0], -1).long()
    i = entry.clamp(min=0)
    at = torch.where(entry >= 0, own_at[i, ids], -1).long()
    replacements = own[i, at.clamp(min=0)].to(y.dtype)
    return torch.where((at >= 0).unsqueeze(-1), replacements, y).contiguous()


def own_embedding_fake(ids, y, own, own_at, own_table, slots, rows):
    op = "own_embedding"
    require(op, own.dim() == 3 and own.shape[2] == y.shape[-1], "own is (adapters, rows, N)")
    require(op, own_at.dim() == 2, "own_at is (adapters, vocabulary)")
    require(op, own_table.shape[1:] == (2,), "own_table is (slots, 2)")
    check_rows(op, ids.shape, y.shape[:-1], rows)
    return y.new_empty(y.shape)


_SCHEMA = "Tensor y, Tensor own, Tensor own_at, Tensor own_table"
define(
    f"own_linear(Tensor x, {_SCHEMA}, Tensor own_bias, Tensor slots, SymInt rows) -> Tensor",
    own_linear,
    own_linear_fake,
)
define(
    f"own_embedding(Tensor ids, {_SCHEMA}, Tensor slots, SymInt rows) -> Tensor",
    own_embedding,
    own_embedding_fake,
)
