"""What one call of a site's module multiplies by its weight: its argument, or what it made of it.

y = mark(x, ...)    the module's own forward made y of x; its products lie between the two
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lorafx.model.sites import Site
from lorafx.op_arguments import bound, operand
from lorafx.ownership.propagate import ancestors
from lorafx.program.context import Context
from lorafx.program.frame import fake_value
from lorafx.program.weight_uses import PERMUTATIONS, RESHAPES, SAME_VALUE, Use

#: They leave the argument's numbers as they are.
_VIEWS = SAME_VALUE | RESHAPES | PERMUTATIONS | {torch.ops.aten.expand.default}


@dataclass(frozen=True)
class ModuleCall:
    """The products with a site's weight in one call of its module.

    Attributes:
        products: the uses of the weight.
        changes_input: an operand of theirs is made of the argument x, and is not x.
        takes_argument: every operand is x.
        twice: the weight multiplies more than once, or what it has multiplied.
    """

    products: tuple[Use, ...] = ()
    changes_input: bool = False
    takes_argument: bool = True
    twice: bool = False

    @classmethod
    def of(cls, ctx: Context, site: Site, mark: fx.Node, uses: Iterable[Use]) -> ModuleCall:
        """The call that `mark` ends. `uses` are those of all weights of the graph."""
        call = bound(mark)
        x = _source(call.get("x", call.get("ids")))
        inside = _made_inside(ctx, site, x)
        made, by_node = inside(call["y"]), ctx.frame.by_node
        found = (use for use in uses if use.node in made and use.x is not None)
        products = [use for use in found if site in by_node[use.weight].sites]
        whole = [use for use in products if use.kind != "blocks"]
        operands = [_source(use.x) for use in products]
        above = [inside(item) for item in operands]
        again = any(use.node in nodes for use in products for nodes in above)
        changes = any(x in nodes and i is not x for i, nodes in zip(operands, above, strict=True))
        straight = all(item is x for item in operands)
        return cls(tuple(products), changes, straight, twice=again or len(whole) > 1)


def _source(node: Any) -> Any:
    """The node that a view or a cast, or several, have their values of."""
    while isinstance(node, fx.Node) and node.target in _VIEWS:
        node = operand(node)
    return node


def _made_inside(ctx: Context, site: Site, x: Any) -> Callable[[Any], set[fx.Node]]:
    """A function that finds what a node is computed of inside of the site's module, up to x."""

    def inside(node: fx.Node) -> bool:
        known = node.meta.get("nn_module_stack")
        own = node is not x and isinstance(fake_value(node), (Tensor, tuple, list))
        return own and (not known or ctx.inside(node, site.module))

    return lambda start: ancestors([start], inside)
