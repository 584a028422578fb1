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

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

import lorafx.kernels.ops.own_rows  # noqa: F401  (defines torch.ops.lorafx)
from lorafx.kernels.ops.delta import rescaled_rows, shifted_rows
from lorafx.kernels.ops.own_rows import OwnRows
from lorafx.model.quantized import is_stored
from lorafx.op_arguments import bound, in_order, rebind
from lorafx.ownership.propagate import ancestors
from lorafx.ownership.site_rules import row_dims
from lorafx.ownership.symbolic import as_expr
from lorafx.program.context import CONV_OP, EMBEDDING_OP, SITE_OP, Context, is_site
from lorafx.program.frame import fake_value
from lorafx.program.plain_products import is_plain_product
from lorafx.program.refusals import Refusal
from lorafx.program.row_maps import ALL_ALIKE

aten = torch.ops.aten
#: Arguments for scales and biases; an embedding has gains only.
SCALE = ("gains", "addend", "shifts")
OWN_INPUT = torch.ops.lorafx.own_input.default
OWN_OPS = {
    SITE_OP: torch.ops.lorafx.own_linear.default,
    EMBEDDING_OP: torch.ops.lorafx.own_embedding.default,
}


_IN_ANOTHER_GRAPH = (
    "its weight is quantised, and a graph break in its call puts the product into another graph"
)


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
        key = (slots, rows, *map(as_expr, leading))
        if key not in self.owners:
            count = self.ctx.row_count(node, len(leading))
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
    _turn_input(ctx, node, call)
    rebind(node, **unused)
    readers = list(node.users)
    with ctx.graph.inserting_before(node.next):
        y = ctx.emit(OWN_OPS[SITE_OP], *in_order(OWN_OPS[SITE_OP], {**call, "y": node}))
    for reader in readers:
        reader.replace_input_with(node, y)


def _turn_input(ctx: Context, node: fx.Node, call: dict[str, Any]) -> None:
    """Have the site's product read what adapters make of x. If it cannot, they multiply it by W
    once more, which only numbers can be."""
    (state, *_), x, y = ctx.states[node], call["x"], call["y"]
    stored = is_stored(state.site.module, state.site.eligible)
    made = _between(x, y) if stored or is_plain_product(node, state) else []
    if not made:
        if stored:
            ctx.refuse(Refusal((state.site,), "own", _IN_ANOTHER_GRAPH))
        return
    # Copies, since the number of rows may come from the product.
    with ctx.graph.inserting_before(node):
        copies = {x: ctx.emit(OWN_INPUT, *in_order(OWN_INPUT, call))}
        for item in made:
            copies[item] = ctx.graph.node_copy(item, lambda n: copies.get(n, n))
    call.update(turned=True, weight=None)
    rebind(node, x=copies[x], y=copies[y])
    for item in reversed(made):
        if not item.users:
            ctx.graph.erase_node(item)
    if not stored and state.use is not None and state.use.x is not None:
        state.use = replace(state.use, node=copies[state.use.node], x=copies[state.use.x])


def _between(x: fx.Node, y: fx.Node) -> list[fx.Node]:
    """What makes y of x, in order."""
    made = [x]
    for item in sorted(ancestors([y], lambda n: n is not x) - {x}):
        if not set(made).isdisjoint(item.all_input_nodes):
            made.append(item)
    return made[1:]
