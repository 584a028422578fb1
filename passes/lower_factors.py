"""Ops of one adapter become what the chosen lowering executes.

    inductor   factors → run_factors_ into y, a kernel generated for its sizes
    reference  nothing to do: the op's own aten runs

The in-place op is wrapped in `auto_functionalized`, as in `lower`: the graph stays functional, and
Inductor writes the delta into the base product's own output where nothing else reads that.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from lorafx.graph.graph_nodes import call_in_place
from lorafx.graph.peft_context import PeftContext
from lorafx.kernels.cpu import build_all
from lorafx.kernels.factor_ops import ADD_FACTORS, FACTORS, RUN_FACTORS
from lorafx.kernels.factor_source import FactorSpec
from lorafx.program.frame import arguments_of, fake_value


@dataclass(frozen=True)
class LowerFactors:
    name: str = "lower_factors"

    def run(self, gm: fx.GraphModule, ctx: PeftContext) -> int:
        if ctx.reference:
            return 0
        specs = {node: _spec(node) for node in ctx.sites}
        kernels = build_all(specs.values())
        for node, spec in specs.items():
            kernel = kernels[spec]
            arguments = arguments_of(node)
            with gm.graph.inserting_before(node):
                packet = ADD_FACTORS if kernel is None else RUN_FACTORS
                op = packet.tensor if node.target is FACTORS.tensor else packet.default
                last = () if kernel is None else (kernel,)
                new = call_in_place(gm.graph, op, (*arguments, *last))
            node.replace_all_uses_with(new)
            ctx.sites[new] = ctx.sites.pop(node)
        return len(specs)


def _spec(node: fx.Node) -> FactorSpec:
    y, x, A, B = (fake_value(argument) for argument in arguments_of(node)[:4])
    return FactorSpec.of(y, x, A, B)
