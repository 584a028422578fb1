"""Results of a call's graph that gradients could reach are detached.

    return y    →    return y.detach()

Nothing is differentiated after a graph with adapters, so AOTAutograd need not trace a backward. A
graph that ends in a break is left: what comes after the break may differentiate, and is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from lorafx.program.context import Context
from lorafx.program.frame import fake_value
from lorafx.torch_internals.frames import ends_in_break


@dataclass(frozen=True)
class DetachResults:
    """Results of a graph with adapters that gradients could reach are detached."""

    name: str = "detach_results"
    required: bool = True

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        if not (ctx.program.runtime.active and ctx.frame.begins_call) or ends_in_break():
            return 0
        output, edits = gm.graph.output_node(), 0
        for node in output.all_input_nodes:
            value = fake_value(node)
            if node.op == "placeholder" or not isinstance(value, Tensor) or not value.requires_grad:
                continue
            with gm.graph.inserting_before(output):
                detached = gm.graph.call_method("detach", (node,))
            detached.meta = dict(node.meta)
            output.replace_input_with(node, detached)
            edits += 1
        return edits
