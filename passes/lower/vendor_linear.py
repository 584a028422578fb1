"""fused_linear by strategies that leave the base product to the vendor's GEMM and prepare for it.

    expand_first    y0 = triton_expanded(x, b, bank); y = add_product_(y0, x, Wᵀ)

What the ops compute is in lorafx.kernels.triton.triton_vendor_ops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lorafx.graph.context import Context
from lorafx.graph.graph_nodes import call_in_place
from lorafx.graph.strategy import Strategy
from lorafx.kernels.triton import triton_vendor_ops
from lorafx.op_arguments import in_order

aten = torch.ops.aten
TRITON_EXPANDED = triton_vendor_ops.triton_expanded._opoverload
ADD_PRODUCT = torch.ops.lorafx.add_product_.default
#: Those whose launches go into the graph on a GPU.
VENDOR_OPS = (TRITON_EXPANDED,)


def vendor_linear(
    graph: fx.Graph, ctx: Context, strategy: Strategy, call: dict[str, Any]
) -> fx.Node:
    """y (M, N) of the arguments of `fused_linear`, with x (M, K) whose rows are in one piece."""
    right = call["weight"]
    if not call["transposed"]:
        right = ctx.call(graph, aten.permute.default, (right, [1, 0]))
    arguments = in_order(TRITON_EXPANDED, call, kernel=strategy.kernel)
    y = ctx.call(graph, TRITON_EXPANDED, arguments)
    return call_in_place(graph, ADD_PRODUCT, (y, call["x"], right))
