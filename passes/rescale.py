"""Adapters' changes beside the delta: replaced rows of the weight, scales and biases.

    y = mm(x, Wᵀ), y' = site(x, y, own...)   →   x₁ = own_input(x, own..., slots, rows)
                                                 y = mm(x₁, Wᵀ)
                                                 y₁ = site(x₁, y, ...)
                                                 y' = own_linear(x, y₁, own..., slots, rows)
    y' = site(x, y, ..., gains, c, shifts)   →   y₁ = site(x, y, ...)
                                                 y₂ = y₁ + G[s] · (y₁ − c)   where G[s] ≠ 0
                                                 y' = y₂ + shifts[s]         where shifts[s] ≠ 0

with s ≥ 0 the slot of each row, for every lowering, only if banks have room. Inductor fuses the
arithmetic into its readers.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

import lorafx.kernels.ops.own_rows  # noqa: F401  (defines torch.ops.lorafx)
from lorafx.kernels.ops.delta import rescaled_rows, shifted_rows
from lorafx.kernels.ops.own_rows import OwnRows
from lorafx.op_arguments import bound, in_order, rebind
from lorafx.ownership.propagate import ancestors
from lorafx.ownership.site_rules import row_dims
from lorafx.ownership.symbolic import as_expr
from lorafx.program.context import CONV_OP, EMBEDDING_OP, SITE_OP, Context, is_site
from lorafx.program.frame import fake_value
from lorafx.program.plain_products import is_plain_product, views_between
from lorafx.program.row_maps import ALL_ALIKE

aten = torch.ops.aten
#: Arguments for scales and biases; an embedding has gains only.
SCALE = ("gains", "addend", "shifts")
OWN_INPUT = torch.ops.lorafx.own_input.default
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
    """Puts the arithmetic of scales into a graph. Equal sites share the owners of their rows."""

    ctx: Context
    owners: dict[tuple[Any, ...], fx.Node] = field(default_factory=dict)

    def move_behind(self, node: fx.Node) -> None:
        """Compute the scale and biases of a site after it, not as its arguments."""
        call = bound(node)
        tables = {name: call[name] for name in SCALE if call.get(name) is not None}
        rebind(node, **dict.fromkeys(name for name in SCALE if name in call))
        readers, convolved = list(node.users), node.target is CONV_OP

        def columns(table: Tensor) -> Tensor:
            if node.target is not SITE_OP:
                return table
            ranges = zip(call["offsets"], call["sizes"], strict=True)
            parts = [table[:, offset : offset + size] for offset, size in ranges]
            return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

        def behind(y: Tensor, owner: Tensor, *values: Tensor) -> Tensor:
            scale = dict(zip(tables, values, strict=True))
            y = y.movedim(1, -1) if convolved else y
            owner = owner.view(-1, *[1] * (y.dim() - 2)) if convolved else owner.view(y.shape[:-1])
            if "gains" in scale:
                y = rescaled_rows(y, columns(scale["gains"]), scale.get("addend"), owner)
            if "shifts" in scale:
                y = shifted_rows(y, columns(scale["shifts"]), owner)
            return y.movedim(-1, 1) if convolved else y

        with self.ctx.graph.inserting_before(node.next):
            last = self.ctx.traced(behind, node, self._owner(node), *tables.values())
        for reader in readers:
            reader.replace_input_with(node, last)

    def _owner(self, node: fx.Node) -> fx.Node:
        """The slot of each row of y, int32 (M,)."""
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
            # Unproved rows: the site's op refuses batches that mix adapters.
            rows = rows if isinstance(rows, fx.Node) or rows > 0 else ALL_ALIKE
            self.owners[key] = self.ctx.row_slots(slots, rows, count)
        return self.owners[key]


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
            unused = (*OwnRows._fields, *(name for name in ("weight", "bias") if name in call))
            if node.target is SITE_OP:
                _replace_behind(ctx, node, call, dict.fromkeys(unused))
            else:
                with gm.graph.inserting_before(node):
                    y = ctx.emit(op, *in_order(op, call))
                rebind(node, y=y, **dict.fromkeys(unused))
            edits += 1
        return edits


def _replace_behind(ctx: Context, node: fx.Node, call: dict[str, Any], unused: Any) -> None:
    """Replace outputs of a linear behind its delta, which its product may be fused with. Rows of a
    slot have the delta in them."""
    turned = _turn_input(ctx, node, call)
    rebind(node, **unused, **({} if turned is None else {"x": turned}))
    if turned is not None:
        call.update(turned=True, weight=None)
    readers = list(node.users)
    with ctx.graph.inserting_before(node.next):
        y = ctx.emit(OWN_OPS[SITE_OP], *in_order(OWN_OPS[SITE_OP], {**call, "y": node}))
    for reader in readers:
        reader.replace_input_with(node, y)


def _turn_input(ctx: Context, node: fx.Node, call: Mapping[str, Any]) -> fx.Node | None:
    """Have the site's product read what adapters make of x, and return that; None if it cannot, so
    they multiply it by W once more."""
    (state, *_) = ctx.states[node]
    use = state.use
    if use is None or use.x is None or not is_plain_product(node, state):
        return None
    if not _moved_before((call["slots"], call["rows"]), use.node):
        return None
    with ctx.graph.inserting_before(use.node):
        x = turned = ctx.emit(OWN_INPUT, *in_order(OWN_INPUT, call))
        for view in views_between(use.x, call["x"]) or ():
            arguments = (x, *view.args[1:])
            x = ctx.emit(view.target, *arguments, **view.kwargs)
    use.node.replace_input_with(use.x, x)
    state.use = replace(use, x=x)
    return turned


def _moved_before(values: Sequence[Any], product: fx.Node) -> bool:
    """Have `values` computed before the product; False if they depend on that."""
    roots = [value for value in values if isinstance(value, fx.Node) and not value < product]
    later = {n for n in ancestors(roots, lambda n: not n < product) if not n < product}
    if product in later:
        return False
    for node in sorted(later):
        product.prepend(node)
    return True
