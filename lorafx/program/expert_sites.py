"""Products with the weights of routed experts get their op:

    y = grouped_mm(x, W, offs)   →   y' = expert_site(x, y, bank, e)

e is the expert of each row, read from the base's dispatch: the ends of the sorted groups, the
chosen indices, the number of a slice, or the place in the batch of matrices.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from lorafx.kernels.cpu.stored_grouped_mm import STORED_GROUPED_MM
from lorafx.model.experts import LOOP, is_switched
from lorafx.model.marks import UNPROVED
from lorafx.model.sites import Site, own_ranges
from lorafx.model.weight_formats import is_dense
from lorafx.op_arguments import bound, in_order, index_of, operand
from lorafx.program.context import EXPERT_MARK, EXPERT_OP, Context
from lorafx.program.frame import fake_value
from lorafx.program.refusals import Refusal
from lorafx.program.weight_uses import Use, expert_uses

aten = torch.ops.aten

#: Operators that return values and their indices.
RANKINGS = frozenset({aten.topk.default, aten.sort.default, aten.sort.stable})
#: Operators that return entries of their operand, in any order.
SAME_INDICES = frozenset(
    {
        *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.clone.default),
        *(aten.expand.default, aten.permute.default, aten.slice.Tensor, aten.select.int),
        *(aten.squeeze.dim, aten.squeeze.default, aten.unsqueeze.default),
        torch.ops.prims.convert_element_type.default,
    }
)

#: The bank's field of siblings that share factors.
ALIKE = "alike"

_NOT_CAPTURED = f"its experts ran, but no product with their weights is in the graph: {LOOP}"
_QUANTISED = (
    "{} holds the weights of its experts in a quantised format, and the kernels that take "
    "that format compute their products. {}"
)
_SWITCHED = (
    "Call model.set_experts_implementation('lorafx'), which multiplies by them as they are stored"
)
_UNSWITCHED = "Its class has no such switch of transformers': leave its experts as plain numbers"


def insert_expert_sites(ctx: Context) -> int:
    """Add an op after each product with a selected expert weight. Returns their number."""
    edits = 0
    served: set[int] = set()
    for node, item in list(ctx.frame.by_node.items()):
        sites = [s for s in item.sites if s.eligible.kind == "experts"]
        if item.kind != "weight" or not sites:
            continue
        uses = expert_uses(node, transposed=sites[0].eligible.transposed)
        quantised = item.part or not is_dense(fake_value(node))
        if quantised and not all(map(_as_stored, uses)):
            if id(sites[0]) not in served:  # each part of a tensor subclass is an input
                way_out = _SWITCHED if is_switched(sites[0].module) else _UNSWITCHED
                reason = _QUANTISED.format(item.label, way_out)
                ctx.refuse(Refusal(tuple(sites), "always", reason))
            served.update(map(id, sites))
            continue
        for use in uses:
            owner = _owner_of_experts(ctx, sites, use)
            if isinstance(owner, Refusal):
                ctx.refuse(owner)
            elif owner is not None:
                _insert_expert_site(ctx, owner, use)
                served.add(id(owner))
                edits += 1
    for mark in [node for node in ctx.graph.nodes if node.target is EXPERT_MARK]:
        site = ctx.site_of_mark(mark)
        if id(site) not in served:
            ctx.refuse(Refusal((site,), "always", _NOT_CAPTURED))
        mark.replace_all_uses_with(bound(mark)["y"])
        ctx.graph.erase_node(mark)
    return edits


def _as_stored(use: Use) -> bool:
    """Whether it is the product that reads all parts; others may each be a product with one."""
    return use.kind != "unknown" and use.node.target is STORED_GROUPED_MM


def _owner_of_experts(ctx: Context, sites: list[Site], use: Use) -> Site | Refusal | None:
    if use.kind == "unknown":
        return ctx.unknown_use(use.weight, use.node, use.reason)
    holders = ctx.other_holders(use.weight)
    if len(sites) == 1 and not holders:
        return sites[0]
    inside = [site for site in sites if ctx.inside(use.node, site.module)]
    if len(inside) == 1:
        return inside[0]
    if any(ctx.inside(use.node, module) for module in holders):
        return None
    return ctx.unknown_use(use.weight, use.node, "several modules share this parameter")


def _insert_expert_site(ctx: Context, site: Site, use: Use) -> None:
    assert use.x is not None
    bank = ctx.bank_inputs(site, use.weight)
    if ctx.program.options.lowering == "inductor":
        ctx.bank_input(site, use.weight, ALIKE)  # `lower` looks for it
    y = use.node
    users = list(y.users)
    with ctx.graph.inserting_before(y.next):
        x_rows, y_rows = _as_matrix(ctx, use.x, use), _as_matrix(ctx, y, use)
        experts = _experts_of(ctx, site, use)
        call = {**bank, **own_ranges(site)._asdict(), "rows": UNPROVED, "count": site.experts}
        arguments = in_order(EXPERT_OP, call, x=x_rows, y=y_rows, experts=experts)
        last = node = ctx.emit(EXPERT_OP, *arguments)
        if y_rows is not y:
            last = ctx.emit(
                aten.reshape.default, node, [ctx.size(y, dim) for dim in range(fake_value(y).dim())]
            )
    for user in users:
        user.replace_input_with(y, last)
    ctx.record(site, node, None, form="rewritten")


def _as_matrix(ctx: Context, node: fx.Node, use: Use) -> fx.Node:
    """A product's operand or result as (rows, F); a "chosen" one has a dimension of size one."""
    if use.kind != "chosen":
        return node
    return ctx.emit(aten.squeeze.dim, node, 2 if use.swapped else 1)


def _experts_of(ctx: Context, site: Site, use: Use) -> fx.Node:
    assert use.x is not None
    device = fake_value(use.x).device
    if isinstance(use.choice, int):
        sizes, kind = [ctx.size(use.x, 0)], {"dtype": torch.int32, "device": device}
        return ctx.emit(aten.full.default, sizes, use.choice, **kind)
    if use.kind == "chosen":
        assert use.choice is not None
        return nonnegative(ctx, use.choice, site.experts)
    if use.kind == "sorted":
        count = ctx.size(use.x, 0)
        numbers = ctx.numbers(count, torch.int32, device)
        return ctx.emit(aten.searchsorted.Tensor, use.choice, numbers, out_int32=True, right=True)
    tokens = ctx.size(use.x, 1)
    numbers = ctx.numbers(site.experts, torch.int32, device)
    column = ctx.emit(aten.unsqueeze.default, numbers, 1)
    wide = ctx.emit(aten.expand.default, column, [site.experts, tokens])
    return ctx.emit(aten.reshape.default, wide, [-1])


def nonnegative(ctx: Context, ids: fx.Node, count: int) -> fx.Node:
    """The indices in 0 … count - 1, where -1 is the last; those of topk and sort are so already."""
    source = ids
    while source.target in SAME_INDICES or source.target in RANKINGS or _ranked(source) == 0:
        source = operand(source)
    if _ranked(source) == 1:
        return ids
    wrapped = ctx.emit(aten.add.Tensor, ids, count)
    negative = ctx.emit(aten.lt.Scalar, ids, 0)
    return ctx.emit(aten.where.self, negative, wrapped, ids)


def _ranked(node: fx.Node) -> int | None:
    """0 for the values of topk and sort, 1 for their indices, None for any other node."""
    if node.target is not operator.getitem or operand(node).target not in RANKINGS:
        return None
    return int(index_of(node))
