"""A dense product and the delta that is added into it become one op, on a CPU.

    run_delta_(y = dense_mm(x, W), x, bank)         →   dense_mm_delta(x, W, bank)
    run_delta_(y = dense_addmm(b, x, W), x, bank)   →   dense_addmm_delta(b, x, W, bank)

Only where nothing else reads the product. Few rows are then multiplied and get their deltas in one
parallel region (lorafx.kernels.cpu.dense).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from lorafx.graph.context import Context
from lorafx.kernels.cpu.dense import (
    DENSE_ADDMM,
    DENSE_ADDMM_DELTA,
    DENSE_MM,
    DENSE_MM_DELTA,
    joined_ready,
)
from lorafx.op_arguments import AUTO_FUNCTIONALIZED, bound, in_order, index_of, op_of
from lorafx.program.frame import fake_value

_JOINED = {DENSE_MM: DENSE_MM_DELTA, DENSE_ADDMM: DENSE_ADDMM_DELTA}
RUN_DELTA = torch.ops.lorafx.run_delta_.default


@dataclass(frozen=True)
class Join:
    """Dense products and their deltas become one op, on a CPU."""

    name: str = "join"
    required: bool = False

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        edits = 0
        for node in [*gm.graph.nodes]:
            if node.target is AUTO_FUNCTIONALIZED and _joins(node) and ctx.take_edit():
                _join(gm.graph, ctx, node)
                edits += 1
        return edits


def _joins(delta: fx.Node) -> bool:
    """Whether it adds a delta into a product of the same x that nobody else reads."""
    if op_of(delta) is not RUN_DELTA:
        return False
    call, readers = bound(delta), [*delta.users]
    product = call["y"]
    if product.target not in _JOINED or len(product.users) > 1:
        return False
    if any(own.target is not operator.getitem or index_of(own) != 1 for own in readers):
        return False
    return bound(product)["x"] is call["x"] and joined_ready(fake_value(product).dtype)


def _join(graph: fx.Graph, ctx: Context, delta: fx.Node) -> None:
    call = bound(delta)
    product = call["y"]
    op = _JOINED[product.target]
    with graph.inserting_before(delta):
        joined = graph.call_function(op, in_order(op, {**bound(product), **call}))
    joined.meta["val"] = fake_value(product)
    for written in [*delta.users]:
        written.replace_all_uses_with(joined)
        if written in ctx.states:
            ctx.states[joined] = ctx.states.pop(written)
        graph.erase_node(written)
    graph.erase_node(delta)
    graph.erase_node(product)
