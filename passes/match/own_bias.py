"""Biases of an adapter's own: they are known to count where the base's bias is added to a product
with the weight, and nowhere else."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from lorafx.graph.context import Context, Refusal
from lorafx.graph.weight_uses import Use
from lorafx.model.sites import Site
from lorafx.op_arguments import bound
from lorafx.passes.match.result_origins import followed

aten = torch.ops.aten


def check_addends(ctx: Context, site: Site, addends: list[fx.Node]) -> None:
    """Refuse rows of an adapter's own where y is not known to be x Wᵀ and the module's own bias,
    which both are replaced."""
    bias = getattr(site.module, "bias", None)
    held = [_held(ctx, addend) for addend in addends]
    if len(held) != (bias is not None) or any(tensor is not bias for tensor in held):
        ctx.refuse(
            Refusal((site,), "own", "the product with its weight is not followed by its own bias")
        )


def refuse_other_uses(ctx: Context, marks: dict[fx.Node, Site], uses: dict[fx.Node, Use]) -> None:
    """Refuse rows of an adapter's own where the bias of their module is read by something else than
    what adds it to a product with its weight: there it would be the base's."""
    sites = [site for site in ctx.program.sites if site.own_rows]
    if not sites:
        return
    for node in ctx.frame.by_node:
        held = _held(ctx, node)
        for site in sites:
            if held is None or held is not getattr(site.module, "bias", None):
                continue
            known = _additions(ctx, site, node, marks, uses)
            if other := next((user for user in node.users if user not in known), None):
                ctx.refuse(Refusal((site,), "own", f"its bias is used by {other.name} too"))


def _additions(
    ctx: Context,
    site: Site,
    bias: fx.Node,
    marks: dict[fx.Node, Site],
    uses: dict[fx.Node, Use],
) -> set[fx.Node]:
    """The nodes that add the bias to a product with the weight of `site`, and its marks, which take
    the bias for DoRA's sake: no adapter has both there."""
    found = {
        use.node
        for use in uses.values()
        if use.bias is bias and site in ctx.frame.by_node[use.weight].sites
    }
    for mark, of in marks.items():
        if of is site:
            found.add(mark)
            use, added = followed(bound(mark)["y"], uses)
            if use is not None:
                found |= {node for node, constant in added if constant is bias}
    return found


def _held(ctx: Context, node: fx.Node) -> Tensor | None:
    """The tensor of a module that this input of the graph is."""
    item = ctx.frame.by_node.get(node)
    return None if item is None or item.holder is None else item.holder.tensor
