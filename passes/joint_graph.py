"""Inductor's own rewrites of a whole graph, which `torch.compile` makes before it generates code.

They leave operators that only Inductor's code generator knows, so from here on a graph does not run
node by node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from lorafx.op_arguments import base_of
from lorafx.program.bodies import bodies
from lorafx.program.context import Context
from lorafx.torch_internals.compat import mode_settings


@dataclass(frozen=True)
class JointGraph:
    """Inductor rewrites the graph, as it does for torch.compile."""

    name: str = "joint_graph"
    required: bool = True

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        options = ctx.program.options
        if options.lowering == "reference":
            return 0
        from lorafx.torch_internals.compat import inductor_config
        from lorafx.torch_internals.inductor import _recursive_joint_graph_passes

        results: Any = gm.graph.output_node().args[0]
        ctx.memory = [base_of(item) for item in results]
        before = _nodes(gm)
        with inductor_config.patch(mode_settings(options.mode)):
            _recursive_joint_graph_passes(gm)
        return len(before ^ _nodes(gm))


def _nodes(gm: fx.GraphModule) -> set[fx.Node]:
    return {node for graph in (gm, *(body for _, body in bodies(gm))) for node in graph.graph.nodes}
