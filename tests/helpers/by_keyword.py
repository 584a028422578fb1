"""The same graph with every argument given by its name, the last one first."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._ops import OpOverload


def by_keyword(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if not isinstance(node.target, OpOverload):
            continue
        names = [argument.name for argument in node.target._schema.arguments]
        given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        node.kwargs = dict(reversed(given.items()))
        node.args = ()
