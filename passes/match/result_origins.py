"""Where a result comes from: the use of a weight behind a module's output."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lorafx.graph.context import ROWS_OF
from lorafx.graph.weight_uses import RESHAPES, SAME_VALUE, Use, is_constant
from lorafx.op_arguments import bound, operand

aten = torch.ops.aten


def origin_of(y: fx.Node, uses: dict[fx.Node, Use]) -> Use | None:
    """The use whose output `y` is, up to views, casts and the addition of a constant (the bias).

    A delta added to `y` is then the same as one added to the use's output.
    """
    return followed(y, uses)[0]


def addends_of(y: fx.Node, uses: dict[fx.Node, Use]) -> list[fx.Node]:
    """What `y`, which has an origin, holds beside the product with the weight."""
    use, added = followed(y, uses)
    constants = [constant for _, constant in added]
    return constants if use is None or use.bias is None else [*constants, use.bias]


def followed(
    y: fx.Node, uses: dict[fx.Node, Use]
) -> tuple[Use | None, list[tuple[fx.Node, fx.Node]]]:
    """The origin of `y`, and the additions behind it: each with the constant that it adds."""
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
    """True where `node` is computed from one of `ancestors`."""
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
