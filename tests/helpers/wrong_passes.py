"""Passes that are wrong on purpose, in a module that other programs can import."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def double_one(gm: fx.GraphModule, ctx: Any) -> int:
    """The site called `up` gives twice its result."""
    return sum(_twice(gm, ctx, node) for node in list(ctx.states) if _paths(ctx, node) == ["up"])


def double_all(gm: fx.GraphModule, ctx: Any) -> int:
    """Every site gives twice its result."""
    return sum(_twice(gm, ctx, node) for node in list(ctx.states))


def double_relu(gm: fx.GraphModule, ctx: Any) -> int:
    """What stands behind a site, and is none, gives twice its result."""
    nodes = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    return sum(_twice(gm, ctx, node) for node in nodes)


def _paths(ctx: Any, node: fx.Node) -> list[str]:
    return [state.site.path for state in ctx.states[node]]


def _twice(gm: fx.GraphModule, ctx: Any, node: fx.Node) -> int:
    with gm.graph.inserting_after(node):
        twice = ctx.call(gm.graph, torch.ops.aten.mul.Tensor, (node, 2.0))
    node.replace_all_uses_with(twice, delete_user_cb=lambda user: user is not twice)
    return 1
