"""fused_linear by the strategy "concat": the vendor's GEMM with a longer x and a longer W.

    x', W' = triton_concat_([x | …], [W | …], bank); y = x' W'ᵀ + b

x' and W' are results of aten.cat, so that Inductor has what computes x write it into x'.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from lorafx.graph.context import Context
from lorafx.kernels.triton import concat_ops
from lorafx.kernels.triton.triton_build import plan_of
from lorafx.op_arguments import AUTO_FUNCTIONALIZED
from lorafx.program.frame import fake_value

aten = torch.ops.aten
TRITON_CONCAT = concat_ops.triton_concat_._opoverload


def concat_linear(graph: fx.Graph, ctx: Context, kernel: int, call: dict[str, Any]) -> fx.Node:
    """y (M, N) of the arguments of `fused_linear`, with x (M, K) whose rows are in one piece."""
    spec = plan_of(kernel).spec
    assert spec.longer is not None
    blocks = fake_value(call["slots" if spec.longer.requests else "B"]).shape[0]
    more = concat_ops.columns_of(spec, blocks)
    longer = {
        "x": _with_columns(graph, ctx, call["x"], 1, more),
        "w": _with_columns(graph, ctx, call["weight"], 0 if call["transposed"] else 1, more),
    }
    x, weight = _write_both(graph, {**call, **longer, "kernel": kernel})
    return product_of(graph, ctx, x, weight, call["bias"], swap=call["transposed"])


def _with_columns(graph: fx.Graph, ctx: Context, tensor: fx.Node, dim: int, more: int) -> fx.Node:
    """A new tensor that holds `tensor` before so many zeros along `dim`."""
    value = fake_value(tensor)
    other: Any = value.shape[1 - dim]
    if not isinstance(other, int):
        other = ctx.call(graph, aten.sym_size.int, (tensor, 1 - dim))
    settings = {"dtype": value.dtype, "device": value.device, "pin_memory": False}
    sizes = [more, other] if dim == 0 else [other, more]
    zeros = ctx.call(graph, aten.full.default, (sizes, 0.0), **settings)
    return ctx.call(graph, aten.cat.default, ([tensor, zeros], dim))


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
