"""The graphs that a graph calls: layers that `outline` has made one, and branches."""

from __future__ import annotations

import torch
from torch import fx

#: Calls a body: `INVOKE(body, name, *operands)`.
INVOKE = torch.ops.higher_order.invoke_subgraph


def bodies(gm: fx.GraphModule) -> list[tuple[str, fx.GraphModule]]:
    """The graphs that `gm` reads as attributes, with their names."""
    names = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    return [
        (name, module)
        for name, module in gm.named_children()
        if name in names and isinstance(module, fx.GraphModule)
    ]
