"""The part of `match` for routed experts: every product with their weights gets its op.

    y = grouped_mm(x, W, offs)   →   y' = expert_site(x, y, bank, e)

e is the expert of each row, read from what the base's own dispatch computes: the ends of the
sorted groups, the chosen indices, or the place in the batch of matrices. No hook marks these
products, since they are inside one forward.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from lorafx.graph.context import EXPERT_MARK, EXPERT_OP, Context, Refusal
from lorafx.graph.expert_uses import ExpertUse, expert_uses
from lorafx.model.experts import LOOP
from lorafx.model.forward_check import is_dense
from lorafx.model.marks import UNPROVED
from lorafx.model.sites import Site, own_ranges
from lorafx.op_arguments import bound, in_order, index_of, operand
from lorafx.program.frame import fake_value

aten = torch.ops.aten
#: Give values and their indices.
RANKINGS = frozenset({aten.topk.default, aten.sort.default, aten.sort.stable})
#: Give some of the indices that they take, in any order.
SAME_INDICES = frozenset(
    {
        *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.clone.default),
        *(aten.expand.default, aten.permute.default, aten.slice.Tensor, aten.select.int),
        *(aten.squeeze.dim, aten.squeeze.default, aten.unsqueeze.default),
        torch.ops.prims.convert_element_type.default,
    }
)

#: The field of a bank of experts that says which siblings share factors.
ALIKE = "alike"

_NOT_CAPTURED = f"its experts ran, but no product with their weights is in the graph: {LOOP}"
_QUANTISED = (
    "{} holds the weights of its experts in a quantised format, and the kernels that take "
    "that format compute their products"
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
            owner = _owner(ctx, sites, use)
            if isinstance(owner, Refusal):
                ctx.refuse(owner)
            elif owner is not None:
                _insert(graph, ctx, owner, use)
                served.add(id(owner))
                edits += 1
    for mark in [node for node in graph.nodes if node.target is EXPERT_MARK]:
        site = ctx.site_of_mark(mark)
        if id(site) not in served:
            ctx.refuse(Refusal((site,), "always", _NOT_CAPTURED))
        mark.replace_all_uses_with(bound(mark)["y"])
        graph.erase_node(mark)
    return edits


def _owner(ctx: Context, sites: list[Site], use: ExpertUse) -> Site | Refusal | None:
    """The site that a use belongs to; None where it belongs to a module that is none and holds the
    same weight."""
    if use.kind == "unknown":
        return ctx.unknown_use(use.weight, use.node, use.reason)
    others = ctx.other_owners(use.weight)
    if len(sites) == 1 and not others:
        return sites[0]
    inside = [site for site in sites if ctx.inside(use.node, site.module)]
    if len(inside) == 1:
        return inside[0]
    if any(ctx.inside(use.node, module) for module in others):
        return None
    return ctx.unknown_use(use.weight, use.node, "several modules share this parameter")


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
        call = {**bank, **own_ranges(site)._asdict(), "rows": UNPROVED, "count": site.experts}
        arguments = in_order(EXPERT_OP, call, x=x_rows, y=y_rows, experts=experts)
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
        return _from_0(graph, ctx, use.choice, site.experts)
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


def _from_0(graph: fx.Graph, ctx: Context, ids: fx.Node, count: int) -> fx.Node:
    """Indices as 0 … E - 1: -1 is the last expert of W[ids]. Those of topk and sort are so."""
    source = ids
    while source.target in SAME_INDICES or source.target in RANKINGS or _position(source) == 0:
        source = operand(source)
    if _position(source) == 1:
        return ids
    wrapped = ctx.call(graph, aten.add.Tensor, (ids, count))
    negative = ctx.call(graph, aten.lt.Scalar, (ids, 0))
    return ctx.call(graph, aten.where.self, (negative, wrapped, ids))


def _position(node: fx.Node) -> int | None:
    """0 for the values that topk and sort give, 1 for their indices, None for anything else."""
    if node.target is not operator.getitem or operand(node).target not in RANKINGS:
        return None
    return int(index_of(node))


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
