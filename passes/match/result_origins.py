"""The origin of a module's output: the use of a weight, and the added terms.

An adapter's rows replace W's and the bias's, so y must be x Wᵀ plus the module's own bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lorafx.graph.context import ROWS_OF, Context, Refusal
from lorafx.graph.weight_uses import RESHAPES, SAME_VALUE, Use, is_constant
from lorafx.model.sites import Site
from lorafx.op_arguments import bound, operand

aten = torch.ops.aten


def addends_of(y: fx.Node, uses: dict[fx.Node, Use]) -> list[fx.Node]:
    """The terms of `y`, which has an origin, beside the product with the weight."""
    use, added = followed(y, uses)
    constants = [constant for _, constant in added]
    return constants if use is None or use.bias is None else [*constants, use.bias]


def followed(
    y: fx.Node, uses: dict[fx.Node, Use]
) -> tuple[Use | None, list[tuple[fx.Node, fx.Node]]]:
    """The use behind `y`, through views, casts and additions, and (addition, constant) pairs."""
    node: Any = y
    added: list[tuple[fx.Node, fx.Node]] = []
    while isinstance(node, fx.Node) and node not in uses:
        if node.target in SAME_VALUE or node.target in RESHAPES:
            node = operand(node)
        elif node.target is ROWS_OF:
            node = bound(node)["y"]
        elif node.target is aten.add.Tensor and (call := bound(node))["alpha"] == 1:
            left, right = call["self"], call["other"]
            if isinstance(right, fx.Node) and is_constant(right):
                added.append((node, right))
                node = left
            elif isinstance(left, fx.Node) and is_constant(left):
                added.append((node, left))
                node = right
            else:
                return None, added
        else:
            return None, added
    return (uses.get(node) if isinstance(node, fx.Node) else None), added


def depends_on(node: fx.Node, ancestors: set[fx.Node]) -> bool:
    """Whether `node` is computed from one of `ancestors`."""
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current in ancestors:
            return True
        if current not in seen:
            seen.add(current)
            pending.extend(current.all_input_nodes)
    return False


def check_addends(ctx: Context, site: Site, addends: list[fx.Node]) -> None:
    """Refuse replaced rows where y is not x Wᵀ plus the module's own bias."""
    bias = getattr(site.module, "bias", None)
    held = [_held(ctx, addend) for addend in addends]
    if len(held) != (bias is not None) or any(tensor is not bias for tensor in held):
        ctx.refuse(
            Refusal((site,), "own", "the product with its weight is not followed by its own bias")
        )


def refuse_other_uses(ctx: Context, marks: dict[fx.Node, Site], uses: dict[fx.Node, Use]) -> None:
    """Refuse replaced rows where another node reads the bias of their module."""
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
    ctx: Context, site: Site, bias: fx.Node, marks: dict[fx.Node, Site], uses: dict[fx.Node, Use]
) -> set[fx.Node]:
    """Nodes that add the bias to a product with the weight of `site`, and its marks."""
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
    item = ctx.frame.by_node.get(node)
    return None if item is None or item.holder is None else item.holder.tensor
