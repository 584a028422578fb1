"""Runs the passes over a graph. Only this module cleans, verifies and times."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import fx

from lorafx.capture.failures import in_pass
from lorafx.capture.verify import check_graph, output_values
from lorafx.pass_order import pipeline
from lorafx.program.context import Context
from lorafx.program.preparation import PassReport

#: Receives the captured graph (with None), then the graph after each pass with its report.
AfterPass = Callable[[fx.GraphModule, Context, PassReport | None], None]


def run_pipeline(gm: fx.GraphModule, ctx: Context, after_pass: AfterPass) -> None:
    """Run all enabled passes over `gm`, in place."""
    options = ctx.program.options
    outputs = output_values(gm)
    after_pass(gm, ctx, None)

    for item in pipeline(options).graph:
        start = time.perf_counter()
        with in_pass(item):
            edits = item.run(gm, ctx)
        for node in reversed(gm.graph.nodes):
            if not stays(node):
                gm.graph.erase_node(node)
        gm.recompile()
        if options.verify == "off":
            gm.graph.lint()
        else:
            check_graph(item.name, gm, ctx, outputs)
        seconds = time.perf_counter() - start
        after_pass(gm, ctx, PassReport(item.name, edits, seconds, len(gm.graph.nodes)))


def stays(node: fx.Node) -> bool:
    """Whether a node without users must stay: placeholders (the calling convention) and effects."""
    return node.op == "placeholder" or bool(node.users) or node.is_impure()
