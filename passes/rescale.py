"""Adapters' changes beside the delta: replaced rows of the weight, scales and biases.

    y' = site(x, y, ..., own...)             →   y₁ = own_linear(x, y, own..., slots, rows)
                                                 y' = site(x, y₁, ...)
    y' = site(x, y, ..., gains, c, shifts)   →   y₁ = site(x, y, ...)
                                                 y₂ = y₁ + G[s] · (y₁ − c)   where G[s] ≠ 0
                                                 y' = y₂ + shifts[s]         where shifts[s] ≠ 0

with s ≥ 0 the slot of each row, for every lowering, only if banks have room. Inductor fuses the
arithmetic into its readers.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

import lorafx.kernels.ops.own_rows  # noqa: F401  (defines torch.ops.lorafx)
from lorafx.kernels.ops.delta import accumulation_dtype
from lorafx.kernels.ops.own_rows import OwnRows
from lorafx.op_arguments import bound, in_order, rebind
from lorafx.ownership.site_rules import row_dims
from lorafx.ownership.symbolic import as_expr
from lorafx.passes.provenance import ALL_ALIKE
from lorafx.program.context import CONV_OP, EMBEDDING_OP, SITE_OP, Context, is_site
from lorafx.program.frame import fake_value

aten = torch.ops.aten
prims = torch.ops.prims
#: Arguments for scales and biases; an embedding has gains only.
SCALE = ("gains", "addend", "shifts")
OWN_OPS = {
    SITE_OP: torch.ops.lorafx.own_linear.default,
    EMBEDDING_OP: torch.ops.lorafx.own_embedding.default,
}


@dataclass(frozen=True)
class Rescale:
    """DoRA's scales and adapters' biases follow the delta, in plain aten."""

    name: str = "rescale"
    required: bool = True

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        scales = _Scales(ctx)
        edits = 0
        for node in gm.graph.nodes:
            if is_site(node) and any(bound(node).get(name) is not None for name in SCALE):
                scales.move_behind(node)
                edits += 1
        return edits


@dataclass
class _Scales:
    """Emits the arithmetic of a graph's scales. Equal sites share the owners of their rows."""

    ctx: Context
    owners: dict[tuple[Any, ...], fx.Node] = field(default_factory=dict)

    def move_behind(self, node: fx.Node) -> None:
        """Compute the scale and biases of a site after it, not as its arguments."""
        scale = {name: value for name, value in bound(node).items() if name in SCALE}
        rebind(node, **dict.fromkeys(scale))
        readers = list(node.users)
        with self.ctx.graph.inserting_before(node.next):
            last = self._rescaled(node, **scale)
        for reader in readers:
            reader.replace_input_with(node, last)

    def _rescaled(
        self,
        node: fx.Node,
        gains: fx.Node | None = None,
        addend: fx.Node | None = None,
        shifts: fx.Node | None = None,
    ) -> fx.Node:
        acc = accumulation_dtype(fake_value(node))
        last = node
        if gains is not None:
            gain, applies = self._by_row(node, gains)
            y = self._cast(last, acc)
            product = y
            if addend is not None:
                product = self.ctx.emit(aten.sub.Tensor, y, self._along_channels(node, addend))
            scaled = self.ctx.emit(aten.mul.Tensor, gain, product)
            last = self._where(applies, self.ctx.emit(aten.add.Tensor, y, scaled), last)
        if shifts is not None:
            shift, applies = self._by_row(node, shifts)
            total = self.ctx.emit(aten.add.Tensor, self._cast(last, acc), shift)
            last = self._where(applies, total, last)
        return last

    def _by_row(self, node: fx.Node, table: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The entries of `table` (S, ΣN) for each row and output, broadcastable to y, and a mask
        of those that apply: the row has a slot, and the entry is not 0."""
        y, owner = fake_value(node), self._owner(node)
        value = self.ctx.emit(aten.index.Tensor, self._columns(node, table), [owner])
        slotted = self.ctx.emit(aten.unsqueeze.default, self.ctx.emit(aten.ge.Scalar, owner, 0), -1)
        applies = self.ctx.emit(aten.ne.Scalar, value, 0)
        applies = self.ctx.emit(aten.logical_and.default, applies, slotted)
        if y.dim() == 2:
            return value, applies
        if node.target is CONV_OP:
            sizes = [self.ctx.size(node, 0), y.shape[1], *[1] * (y.dim() - 2)]
        else:
            sizes = [self.ctx.size(node, dim) for dim in range(y.dim())]
        reshape = aten.reshape.default
        return self.ctx.emit(reshape, value, sizes), self.ctx.emit(reshape, applies, sizes)

    def _along_channels(self, node: fx.Node, addend: fx.Node) -> fx.Node:
        """A bias (N,) shaped for y: a convolution has its channels second."""
        if node.target is not CONV_OP:
            return addend
        y = fake_value(node)
        return self.ctx.emit(aten.reshape.default, addend, [y.shape[1], *[1] * (y.dim() - 2)])

    def _where(self, mask: fx.Node, total: fx.Node, otherwise: fx.Node) -> fx.Node:
        total = self._cast(total, fake_value(otherwise).dtype)
        return self.ctx.emit(aten.where.self, mask, total, otherwise)

    def _columns(self, node: fx.Node, table: fx.Node) -> fx.Node:
        if node.target is not SITE_OP:
            return table
        call = bound(node)
        parts = [
            self.ctx.emit(aten.slice.Tensor, table, 1, offset, offset + size)
            for offset, size in zip(call["offsets"], call["sizes"], strict=True)
        ]
        return parts[0] if len(parts) == 1 else self.ctx.emit(aten.cat.default, parts, 1)

    def _owner(self, node: fx.Node) -> fx.Node:
        """The slot of each row of y, int32 (M,), like `lorafx.kernels.ops.delta.row_slots`."""
        call = bound(node)
        slots, rows = call["slots"], call["rows"]
        leading = tuple(fake_value(node).shape[: row_dims(node)])
        key, emit = (slots, rows, *map(as_expr, leading)), self.ctx.emit
        if key not in self.owners:
            count: Any = 1
            for dim in range(len(leading)):
                size = self.ctx.size(node, dim)
                known = isinstance(count, int) and isinstance(size, int)
                count = count * size if known else emit(operator.mul, count, size)
            index = self.ctx.numbers(count, torch.int64, fake_value(node).device)
            # Unproved rows: the site's op refuses batches that mix adapters.
            rows = rows if isinstance(rows, fx.Node) or rows > 0 else ALL_ALIKE
            index = emit(aten.div.Scalar_mode, index, rows, rounding_mode="floor")
            index = emit(aten.remainder.Scalar, index, self.ctx.size(slots, 0))
            self.owners[key] = emit(aten.index.Tensor, slots, [index])
        return self.owners[key]

    def _cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        if fake_value(node).dtype == dtype:
            return node
        return self.ctx.emit(prims.convert_element_type.default, node, dtype)


@dataclass(frozen=True)
class ReplaceRows:
    """Adapters' own rows of a weight replace the base's."""

    name: str = "replace_rows"
    required: bool = True

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        edits = 0
        for node in gm.graph.nodes:
            op = OWN_OPS.get(node.target)
            if op is None or bound(node).get("own") is None:
                continue
            call = bound(node)
            # Unproved rows: the site's op refuses batches that mix adapters.
            call["rows"] = call["rows"] or ALL_ALIKE
            with gm.graph.inserting_before(node):
                y = ctx.emit(op, *in_order(op, call))
            rebind(node, y=y, **dict.fromkeys(OwnRows._fields))
            edits += 1
        return edits
