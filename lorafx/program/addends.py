"""What is added to a product with a weight.

An adapter's rows replace those of W and the bias, so y must be x Wᵀ plus the module's own bias.
DoRA does not scale what is added.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lorafx.model.sites import Site
from lorafx.op_arguments import bound, operand, rebind
from lorafx.program.context import (
    CONV_OP,
    ROWS_OF,
    SITE_OP,
    Context,
    Refusal,
)
from lorafx.program.frame import fake_value
from lorafx.program.weight_uses import (
    RESHAPES,
    SAME_VALUE,
    Use,
    is_constant,
)

aten = torch.ops.aten


def addends_of(y: fx.Node, uses: dict[fx.Node, Use]) -> list[fx.Node]:
    """The terms of `y`, a sum, except the product with the weight."""
    use, added = use_behind(y, uses)
    constants = [constant for _, constant in added]
    return constants if use is None or use.bias is None else [*constants, use.bias]


def use_behind(
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


def check_addends(ctx: Context, site: Site, addends: list[fx.Node]) -> None:
    """Refuse replaced rows unless y is x Wᵀ plus the module's own bias."""
    bias = getattr(site.module, "bias", None)
    tensors = [_holder_tensor(ctx, addend) for addend in addends]
    if len(tensors) != (bias is not None) or any(tensor is not bias for tensor in tensors):
        ctx.refuse(
            Refusal((site,), "own", "the product with its weight is not followed by its own bias")
        )


def refuse_used_bias(ctx: Context, marks: dict[fx.Node, Site], uses: dict[fx.Node, Use]) -> None:
    """Refuse replaced rows if something else reads the bias of their module."""
    sites = [site for site in ctx.program.sites if site.own_rows]
    if not sites:
        return
    for node in ctx.frame.by_node:
        tensor = _holder_tensor(ctx, node)
        for site in sites:
            if tensor is None or tensor is not getattr(site.module, "bias", None):
                continue
            additions = _additions_of_bias(ctx, site, node, marks, uses)
            if other := next((user for user in node.users if user not in additions), None):
                ctx.refuse(Refusal((site,), "own", f"its bias is used by {other.name} too"))


def _additions_of_bias(
    ctx: Context, site: Site, bias: fx.Node, marks: dict[fx.Node, Site], uses: dict[fx.Node, Use]
) -> set[fx.Node]:
    """Nodes that add the bias to a product with the weight of `site`, and its marks."""
    additions = {
        use.node
        for use in uses.values()
        if use.bias is bias and site in ctx.frame.by_node[use.weight].sites
    }
    for mark, marked in marks.items():
        if marked is site:
            additions.add(mark)
            use, added = use_behind(bound(mark)["y"], uses)
            if use is not None:
                additions |= {node for node, constant in added if constant is bias}
    return additions


def _holder_tensor(ctx: Context, node: fx.Node) -> Tensor | None:
    item = ctx.frame.by_node.get(node)
    return None if item is None or item.holder is None else item.holder.tensor


def rescales(node: fx.Node) -> bool:
    return node.target in (SITE_OP, CONV_OP) and bound(node)["gains"] is not None


def set_addend(ctx: Context, site: Site, node: fx.Node, addends: list[fx.Node]) -> None:
    """Set the op's `addend` to the sum of y's addends, which DoRA does not scale."""
    if any(size != 1 for item in addends for size in fake_value(item).shape[:-1]):
        ctx.refuse(
            Refusal(
                (site,), "dora", "more than a bias is added in the same operator as its product"
            )
        )
        return
    total = None
    with ctx.graph.inserting_before(node):
        for item in addends:
            total = item if total is None else ctx.emit(aten.add.Tensor, total, item)
    rebind(node, addend=total)
