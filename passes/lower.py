"""LoRA nodes become what the chosen lowering executes.

    inductor   fused_linear → mm / addmm, then add_delta_ into its output in place;
               site → add_delta_ into y. The delta op carries the id of a generated kernel.
    reference  nothing to do: the ops' own aten implementations run.

The in-place op is wrapped in `auto_functionalized`, so the graph stays functional, and Inductor
decides that y's buffer may be written (it is the GEMM's own output) without a copy.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lorafx.context import EMBEDDING_OP, FUSED_OP, SITE_OP, Context
from lorafx.frame import fake_value
from lorafx.strategy import kernel_id

aten = torch.ops.aten
ADD_DELTA = torch.ops.lorafx.add_delta_.default
ADD_EMBEDDING_DELTA = torch.ops.lorafx.add_embedding_delta_.default


@dataclass(frozen=True)
class Lower:
    name: str = "lower"
    required: bool = True

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        if ctx.program.options.lowering == "reference":
            return 0
        edits = 0
        for node in list(ctx.states):
            with gm.graph.inserting_before(node):
                new = _LOWERINGS[node.target](gm.graph, ctx, node)
            node.replace_all_uses_with(new)
            states = ctx.states.pop(node)
            ctx.states[new] = states
            edits += 1
        return edits


def _linear(graph: fx.Graph, ctx: Context, node: fx.Node) -> fx.Node:
    x, weight, bias, A, B, ranks, scales, slots, siblings, offsets, sizes, rows, swap = node.args
    x_flat = _flat(graph, ctx, x)
    right = weight if swap else ctx.call(graph, aten.permute.default, (weight, [1, 0]))
    if bias is None:
        y = ctx.call(graph, aten.mm.default, (x_flat, right))
    else:
        y = ctx.call(graph, aten.addmm.default, (bias, x_flat, right))
    delta = (A, B, ranks, scales, slots, siblings, offsets, sizes, rows)
    y = _add_delta(graph, ctx, y, x_flat, delta, kernel_id(ctx, node))
    return _shaped(graph, ctx, y, x, node)


def _site(graph: fx.Graph, ctx: Context, node: fx.Node) -> fx.Node:
    x, y, A, B, ranks, scales, slots, sibling, offset, rows = node.args[:10]
    size = fake_value(node).shape[-1]
    delta = (A, B, ranks, scales, slots, [sibling], [offset], [size], rows)
    flat = _flat(graph, ctx, y)
    y_new = _add_delta(graph, ctx, flat, _flat(graph, ctx, x), delta, kernel_id(ctx, node))
    return _shaped(graph, ctx, y_new, y, node)


def _embedding(graph: fx.Graph, ctx: Context, node: fx.Node) -> fx.Node:
    ids, y, *bank, rows = node.args
    names = ("ids", "A", "B", "ranks", "scales", "slots", "rows", "kernel")
    values = (ids, *bank, rows, kernel_id(ctx, node))
    return _in_place(graph, ctx, ADD_EMBEDDING_DELTA, y, dict(zip(names, values, strict=True)))


def _add_delta(
    graph: fx.Graph,
    ctx: Context,
    y: fx.Node,
    x: fx.Node,
    delta: tuple[Any, ...],
    kernel: int,
) -> fx.Node:
    names = ("A", "B", "ranks", "scales", "slots", "siblings", "offsets", "sizes", "rows")
    arguments = {"x": x, **dict(zip(names, delta, strict=True)), "kernel": kernel}
    return _in_place(graph, ctx, ADD_DELTA, y, arguments)


def _in_place(
    graph: fx.Graph, ctx: Context, op: Any, y: Any, arguments: dict[str, Any]
) -> fx.Node:
    """y after `op` has written it, as functional nodes."""
    both = graph.call_function(
        torch.ops.higher_order.auto_functionalized, (op,), {"y": y, **arguments}
    )
    value = fake_value(y)
    both.meta["val"] = (None, value)
    with graph.inserting_after(both):
        written = graph.call_function(operator.getitem, (both, 1))
    written.meta["val"] = value
    return written


def _flat(graph: fx.Graph, ctx: Context, node: Any) -> fx.Node:
    """(…, F) as (M, F)."""
    value = fake_value(node)
    if value.dim() == 2:
        return node
    return ctx.call(graph, aten.reshape.default, (node, [-1, value.shape[-1]]))


def _shaped(graph: fx.Graph, ctx: Context, y: fx.Node, source: Any, like: fx.Node) -> fx.Node:
    """(M, N) as the shape of `like`, whose leading sizes are those of `source`."""
    value = fake_value(like)
    if value.dim() == 2:
        return y
    sizes = [
        size if isinstance(size, int) else ctx.call(graph, aten.sym_size.int, (source, dim))
        for dim, size in enumerate(value.shape)
    ]
    return ctx.call(graph, aten.reshape.default, (y, sizes))


_LOWERINGS = {SITE_OP: _site, EMBEDDING_OP: _embedding, FUSED_OP: _linear}
