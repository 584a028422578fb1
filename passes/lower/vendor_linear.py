"""fused_linear by strategies that leave the base product to the vendor's GEMM and prepare for it.

    expand_first    y0 = triton_expanded(x, b, bank); y = add_product_(y0, x, Wᵀ)
    concat          x', W' = triton_concat_([… | x | …], [… | W | …], bank); y = x' W'ᵀ + b, or a
                    product for each sibling ("concat_apart")

What the ops compute is in lorafx.kernels.triton.triton_vendor_ops. x' and W' are results of
aten.cat, so that Inductor has what computes x write it into x', and copies W.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from lorafx.graph.context import Context
from lorafx.graph.graph_nodes import call_in_place
from lorafx.graph.strategy import Strategy
from lorafx.kernels.triton import triton_vendor_ops
from lorafx.kernels.triton.concat_launch import layout_of
from lorafx.kernels.triton.triton_build import CONCAT, plan_of
from lorafx.op_arguments import AUTO_FUNCTIONALIZED, in_order
from lorafx.passes.pack import with_room
from lorafx.program.frame import fake_value

aten = torch.ops.aten
TRITON_EXPANDED = triton_vendor_ops.triton_expanded._opoverload
TRITON_CONCAT = triton_vendor_ops.triton_concat_._opoverload
ADD_PRODUCT = torch.ops.lorafx.add_product_.default
#: On an input whose room some node of the graph writes.
_WRITTEN = "lorafx_room_written"
#: Those whose launches go into the graph on a GPU.
VENDOR_OPS = (TRITON_EXPANDED, TRITON_CONCAT)


def vendor_linear(
    graph: fx.Graph, ctx: Context, strategy: Strategy, call: dict[str, Any]
) -> fx.Node:
    """y (M, N) of the arguments of `fused_linear`, with x (M, K) whose rows are in one piece."""
    if strategy.name in CONCAT:
        return _concat(graph, ctx, strategy.kernel, call)
    right = call["weight"]
    if not call["transposed"]:
        right = ctx.call(graph, aten.permute.default, (right, [1, 0]))
    arguments = in_order(TRITON_EXPANDED, call, kernel=strategy.kernel)
    y = ctx.call(graph, TRITON_EXPANDED, arguments)
    return call_in_place(graph, ADD_PRODUCT, (y, call["x"], right))


def _concat(graph: fx.Graph, ctx: Context, kernel: int, call: dict[str, Any]) -> fx.Node:
    spec = plan_of(kernel).spec
    layout = layout_of(spec)
    assert spec.longer is not None
    blocks = fake_value(call["slots" if spec.longer.requests else "B"]).shape[0]
    left, right = layout.columns(blocks)
    long = 0 if call["transposed"] else 1  # the dimension of W that is K
    x = _with_columns(graph, ctx, call["x"], 1, left, right)
    room = room_of(call["weight"], left, right)
    at: dict[str, Any] = {"first": left, "row": 0, "kernel": kernel}
    if room is None:
        w = _with_columns(graph, ctx, call["weight"], long, left, right)
    else:
        w, at["first"], at["row"] = room
        w.meta[_WRITTEN] = True
    x, weight = _write_both(graph, {**call, "x": x, "w": w, **at})
    if room is not None:
        # A graph writes an input by a copy into it, which Inductor leaves out where it can.
        ctx.call(graph, aten.copy_.default, (w, weight))
        start, end = at["row"], at["row"] + spec.out_features
        weight = ctx.call(graph, aten.slice.Tensor, (weight, 0, start, end))
        start, end = at["first"] - left, at["first"] + layout.in_features + right
        weight = ctx.call(graph, aten.slice.Tensor, (weight, 1, start, end))
    bias, swap = call["bias"], call["transposed"]
    if not layout.apart:
        return product_of(graph, ctx, x, weight, bias, swap=swap)
    parts: list[fx.Node] = []
    start = 0
    for place, size in zip(layout.places, call["sizes"], strict=True):
        span, end = layout.span(place, blocks), start + size
        own_x = ctx.call(graph, aten.slice.Tensor, (x, 1, *span))
        own = ctx.call(graph, aten.slice.Tensor, (weight, 1 - long, start, end))
        own = ctx.call(graph, aten.slice.Tensor, (own, long, *span))
        own_bias = bias and ctx.call(graph, aten.slice.Tensor, (bias, 0, start, end))
        parts.append(product_of(graph, ctx, own_x, own, own_bias, swap=swap))
        start = end
    return ctx.call(graph, aten.cat.default, (parts, 1))


def room_of(weight: fx.Node, left: int, right: int) -> tuple[fx.Node, int, int] | None:
    """The input that holds `weight` with so many columns beside it, and its place there; None where
    there is none, or a node of the graph writes into it already."""
    found = with_room(weight)
    if found is None or found[0].meta.get(_WRITTEN):
        return None
    packed, first, _ = found
    columns = fake_value(packed).shape[1] - fake_value(weight).shape[1]
    return found if first >= left and columns - first >= right else None


def _with_columns(
    graph: fx.Graph, ctx: Context, tensor: fx.Node, dim: int, before: int, behind: int
) -> fx.Node:
    """A new tensor that holds `tensor` between so many zeros along `dim`."""
    value = fake_value(tensor)
    other: Any = value.shape[1 - dim]
    if not isinstance(other, int):
        other = ctx.call(graph, aten.sym_size.int, (tensor, 1 - dim))
    settings = {"dtype": value.dtype, "device": value.device, "pin_memory": False}

    def zeros(count: int) -> list[fx.Node]:
        sizes = [count, other] if dim == 0 else [other, count]
        return [ctx.call(graph, aten.full.default, (sizes, 0.0), **settings)] if count else []

    return ctx.call(graph, aten.cat.default, ([*zeros(before), tensor, *zeros(behind)], dim))


def _write_both(graph: fx.Graph, values: dict[str, Any]) -> tuple[fx.Node, fx.Node]:
    """x' and W' after their columns were written, as functional nodes."""
    names = [argument.name for argument in TRITON_CONCAT._schema.arguments]
    both = graph.call_function(
        AUTO_FUNCTIONALIZED, (TRITON_CONCAT,), {name: values[name] for name in names}
    )
    written = [fake_value(values[name]) for name in ("x", "w")]
    both.meta["val"] = (None, *written)
    found = []
    with graph.inserting_after(both):
        for index, value in ((2, written[1]), (1, written[0])):
            node = graph.call_function(operator.getitem, (both, index))
            node.meta["val"] = value
            found.append(node)
    return found[1], found[0]


def product_of(
    graph: fx.Graph, ctx: Context, x: fx.Node, weight: fx.Node, bias: fx.Node | None, *, swap: bool
) -> fx.Node:
    """x Wᵀ + b (x W with `swap`) for x (M, K)."""
    right = weight if swap else ctx.call(graph, aten.permute.default, (weight, [1, 0]))
    if bias is None:
        return ctx.call(graph, aten.mm.default, (x, right))
    return ctx.call(graph, aten.addmm.default, (bias, x, right))
