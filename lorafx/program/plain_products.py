"""Base products of one site alone: W enters them unchanged, and y has no other reader."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lorafx.op_arguments import bound, operand
from lorafx.program.context import SiteState
from lorafx.program.frame import fake_value
from lorafx.program.weight_uses import RESHAPES

aten = torch.ops.aten
_PRODUCTS = frozenset({aten.mm.default, aten.addmm.default, aten.linear.default})


def is_plain_product(node: fx.Node, state: SiteState) -> bool:
    """Whether the y of a site's op is the product of its x, perhaps reshaped, and nothing else."""
    use = state.use
    if use is None or not use.plain or use.node.target not in _PRODUCTS:
        return False
    call = bound(node)
    x, y = call["x"], call["y"]
    if use.x is None or views_between(use.x, x) is None:
        return False
    if use.bias is not None and fake_value(use.bias).dim() != 1:
        return False
    if tuple(fake_value(x).shape[:-1]) != tuple(fake_value(node).shape[:-1]):
        return False
    chain: Any = y
    while chain is not use.node:
        if chain.target not in RESHAPES or len(chain.users) != 1:
            return False
        chain = operand(chain)
    return len(use.node.users) == 1


def views_between(node: fx.Node, base: fx.Node) -> list[fx.Node] | None:
    """The reshapes that make `node` of `base`, in order; None if others do."""
    views: list[fx.Node] = []
    while node is not base and isinstance(node, fx.Node) and node.target in RESHAPES:
        views.insert(0, node)
        node = operand(node)
    return views if node is base else None
