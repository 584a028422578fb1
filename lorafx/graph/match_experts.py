"""The part of `match` that is about routed experts: every product with their weights gets its op.

    y = grouped_mm(x, W, offs)   →   y' = expert_site(x, y, bank, e)

e is the expert of each row, read from what the base's own dispatch computes: the ends of the
sorted groups, the chosen indices, or the place in the batch of matrices. No hook marks these
products, since they lie between two others inside of one forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lorafx.graph.context import EXPERT_MARK, EXPERT_OP, Context, Refusal
from lorafx.graph.expert_uses import ExpertUse, expert_uses
from lorafx.graph.frame import arguments_of, fake_value
from lorafx.model.experts import LOOP
from lorafx.model.marks import UNPROVED, is_dense
from lorafx.model.sites import Site, own_ranges

aten = torch.ops.aten

#: The field of a bank of experts that says which siblings share factors.
ALIKE = "alike"

_NOT_CAPTURED = f"its experts ran, and no product with their weight is in the graph: {LOOP}"
_QUANTISED = (
    "{} holds the weights of its experts in a quantised format, and their products are inside of "
    "kernels that take it as it is"
)


def insert_expert_sites(graph: fx.Graph, ctx: Context) -> int:
    """Put an op behind each product with a selected expert weight; returns how many."""
    edits = 0
    served: set[int] = set()
    for node, item in list(ctx.frame.by_node.items()):
        sites = [s for s in item.sites if s.eligible.kind == "experts"]
        if item.kind != "weight" or not sites:
            continue
        if item.part or not is_dense(fake_value(node)):
            if id(sites[0]) not in served:  # one input for each part of a tensor subclass
                ctx.refuse(Refusal(tuple(sites), "always", _QUANTISED.format(item.label)))
            served.update(map(id, sites))
            continue
        for use in expert_uses(node, transposed=sites[0].eligible.transposed):
            if use.kind == "unknown" or len(sites) > 1:
                reason = use.reason or "several modules share it"
                ctx.refuse(ctx.unknown_use(node, use.node, reason))
            else:
                _insert(graph, ctx, sites[0], use)
                served.add(id(sites[0]))
                edits += 1
    for mark in [node for node in graph.nodes if node.target is EXPERT_MARK]:
        site = ctx.site_of_mark(mark)
        if id(site) not in served:
            ctx.refuse(Refusal((site,), "always", _NOT_CAPTURED))
        mark.replace_all_uses_with(arguments_of(mark)[0])
        graph.erase_node(mark)
    return edits


def _insert(graph: fx.Graph, ctx: Context, site: Site, use: ExpertUse) -> None:
    assert use.x is not None
    bank = ctx.bank_inputs(graph, site, use.weight)
    if ctx.program.options.lowering == "inductor":
        ctx.bank_input(graph, site, use.weight, ALIKE)  # `lower` looks for it
    y = use.node
    users = list(y.users)
    with graph.inserting_before(y.next):
        x_rows, y_rows = _rows(graph, ctx, use.x, use), _rows(graph, ctx, y, use)
        experts = _experts(graph, ctx, site, use)
        arguments = (x_rows, y_rows, *bank, experts, *own_ranges(site), UNPROVED, site.experts)
        last = node = ctx.call(graph, EXPERT_OP, arguments)
        if y_rows is not y:
            last = ctx.call(graph, aten.reshape.default, (node, _sizes(graph, ctx, y)))
    for user in users:
        user.replace_input_with(y, last)
    ctx.record(site, node, None, form="rewritten")


def _rows(graph: fx.Graph, ctx: Context, node: fx.Node, use: ExpertUse) -> fx.Node:
    """(rows, F) of what a product takes or gives: as it is when sorted, without the dimension of
    size one when chosen; (E, T, F) keeps both, since its rows are those of (E·T, F)."""
    if use.kind != "chosen":
        return node
    return ctx.call(graph, aten.squeeze.dim, (node, 2 if use.swapped else 1))


def _experts(graph: fx.Graph, ctx: Context, site: Site, use: ExpertUse) -> fx.Node:
    """The expert of each row, (rows,)."""
    assert use.x is not None
    device = fake_value(use.x).device
    if use.kind == "chosen":
        assert use.choice is not None
        return use.choice
    if use.kind == "sorted":
        count = _size(graph, ctx, use.x, 0)
        numbers = _numbers(graph, ctx, count, device)
        return ctx.call(
            graph, aten.searchsorted.Tensor, (use.choice, numbers), out_int32=True, right=True
        )
    tokens = _size(graph, ctx, use.x, 1)
    every = _numbers(graph, ctx, site.experts, device)
    column = ctx.call(graph, aten.unsqueeze.default, (every, 1))
    wide = ctx.call(graph, aten.expand.default, (column, [site.experts, tokens]))
    return ctx.call(graph, aten.reshape.default, (wide, [-1]))


def _numbers(graph: fx.Graph, ctx: Context, count: Any, device: torch.device) -> fx.Node:
    """0, 1, … count - 1 as int32, in the form that Inductor's decompositions give `arange`."""
    settings = {"start": 0, "step": 1, "dtype": torch.int32, "device": device}
    iota = torch.ops.prims.iota.default
    return ctx.call(graph, iota, (count,), **settings, requires_grad=False)


def _size(graph: fx.Graph, ctx: Context, node: fx.Node, dim: int) -> Any:
    size = fake_value(node).shape[dim]
    return size if isinstance(size, int) else ctx.call(graph, aten.sym_size.int, (node, dim))


def _sizes(graph: fx.Graph, ctx: Context, node: fx.Node) -> list[Any]:
    return [_size(graph, ctx, node, dim) for dim in range(fake_value(node).dim())]
