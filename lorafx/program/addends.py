"""What is added to a product with a weight.

An adapter's rows replace those of W and the bias, so y must be x Wᵀ plus the module's own bias.
DoRA does not scale what is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lorafx.model.extras import EXTRAS, When
from lorafx.model.made_weights import maker_of
from lorafx.model.quantized import is_stored
from lorafx.model.sites import Site
from lorafx.op_arguments import bound, operand, rebind
from lorafx.program.context import CONV_OP, ROWS_OF, SITE_OP, Context
from lorafx.program.frame import fake_value
from lorafx.program.refusals import Refusal
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


def addends_behind(use: Use) -> list[tuple[fx.Node, fx.Node]]:
    """(addition, constant) pairs of the sum that a product becomes, through views and casts."""
    node, added = use.node, list[tuple[fx.Node, fx.Node]]()
    while len(node.users) == 1:
        (user,) = node.users
        if user.target is aten.add.Tensor and (call := bound(user))["alpha"] == 1:
            other = call["other"] if call["self"] is node else call["self"]
            if not isinstance(other, fx.Node) or not is_constant(other):
                break
            added.append((user, other))
        elif user.target not in SAME_VALUE and user.target not in RESHAPES:
            break
        node = user
    return added


def check_addends(
    ctx: Context,
    site: Site,
    addends: Sequence[fx.Node],
    later: Sequence[tuple[fx.Node, fx.Node]] = (),
) -> bool:
    """Whether the module's own bias is added to x Wᵀ, with y or `later`, and an adapter's takes its
    place there. Refuses replaced rows unless y is x Wᵀ plus that bias alone."""
    bias, kinds = getattr(site.module, "bias", None), _kinds(ctx, site)
    tensors = [_holder_tensor(ctx, addend) for addend in addends]
    together = [*tensors, *(_holder_tensor(ctx, constant) for _, constant in later)]
    if "own" in kinds and [*map(id, tensors)] != ([] if bias is None else [id(bias)]):
        reason = "the product with its weight is not followed by its own bias"
        ctx.refuse(Refusal((site,), "own", reason))
    times = sum(tensor is bias for tensor in together)
    if "bias" in kinds and bias is not None and times > 1:
        ctx.refuse(Refusal((site,), "bias", f"its bias is added {times} times"))
    return bias is None or times == 1


def _kinds(ctx: Context, site: Site) -> list[When]:
    """What adapters may have at the site that changes its bias."""
    bank = ctx.program.home(site)[0].bank
    kinds: tuple[When, ...] = ("own", "bias")
    return [when for when in kinds if getattr(bank, EXTRAS[when].room) is not None]


def refuse_used_bias(ctx: Context, marks: dict[fx.Node, Site], uses: dict[fx.Node, Use]) -> None:
    """Refuse replaced rows, and another bias, if something else reads the bias of their module."""
    sites = [(site, kinds) for site in ctx.program.sites if (kinds := _kinds(ctx, site))]
    if not sites:
        return
    for node in ctx.frame.by_node:
        tensor = _holder_tensor(ctx, node)
        for site, kinds in sites:
            if tensor is None or tensor is not getattr(site.module, "bias", None):
                continue
            additions = _additions_of_bias(ctx, site, node, marks, uses)
            if other := next((user for user in node.users if user not in additions), None):
                for when in kinds:
                    ctx.refuse(Refusal((site,), when, f"its bias is used by {other.name} too"))


def _additions_of_bias(
    ctx: Context, site: Site, bias: fx.Node, marks: dict[fx.Node, Site], uses: dict[fx.Node, Use]
) -> set[fx.Node]:
    """Nodes that add the bias to a product with the weight of `site`, and its marks."""
    own = [use for use in uses.values() if site in ctx.frame.by_node[use.weight].sites]
    additions = {use.node for use in own if use.bias is bias}
    additions |= {node for use in own for node, item in addends_behind(use) if item is bias}
    made = maker_of(site.module, site.eligible.weight)
    if made or is_stored(site.module, site.eligible):  # only the whole call is known: x Wᵀ + b
        additions |= {user for user in bias.users if ctx.inside(user, site.module)}
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
