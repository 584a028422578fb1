"""Running the passes over a graph. Only this module cleans, verifies, times and dumps."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import fx

from lorafx.capture.dump import GraphDump
from lorafx.capture.failures import in_pass
from lorafx.capture.stage_views import StageViews
from lorafx.capture.verify import check_graph, output_values
from lorafx.graph.context import Context
from lorafx.pass_order import CAPTURED, GraphPass, pipeline, run_passes
from lorafx.program.preparation import PassReport

#: Is told of the captured graph (None), then of each pass and the graph that it left.
AfterPass = Callable[[GraphPass | None, fx.GraphModule], None]


def run_pipeline(
    gm: fx.GraphModule,
    ctx: Context,
    dump: GraphDump,
    after_pass: AfterPass | None = None,
) -> list[PassReport]:
    """Run all passes that are switched on over `gm`, in place.

    `after_pass` is called with None and the captured graph, then with each pass and the graph that
    it left. Numeric verification keeps its copies that way.
    """
    options = ctx.program.options
    outputs = output_values(gm)
    names, states = dump.names, ctx.states
    names.note_inputs(ctx.frame, ctx.frame.by_node)
    views = StageViews(
        names,
        ctx.frame.by_node,
        lambda node: states[node][0].site.path if node in states else "",
    )
    dump.add(views.stage(gm, CAPTURED, ctx))
    if after_pass is not None:
        after_pass(None, gm)

    def cleaned(item: GraphPass, edits: int, seconds: float) -> PassReport:
        start = time.perf_counter()
        for node in reversed(gm.graph.nodes):
            if not stays(node):
                gm.graph.erase_node(node)
        gm.recompile()
        if options.verify == "off":
            gm.graph.lint()
        else:
            check_graph(item.name, gm, ctx, outputs)
        seconds += time.perf_counter() - start
        nodes = len(gm.graph.nodes)
        names.note_pass(gm, ctx)
        dump.outlined = ctx.outlined
        dump.add(views.stage(gm, item.name, ctx, edits=edits, seconds=seconds))
        if after_pass is not None:
            after_pass(item, gm)
        return PassReport(item.name, edits, seconds, nodes)

    reports = run_passes(
        pipeline(options).graph,
        lambda item: item.run(gm, ctx),
        around=in_pass,
        after=cleaned,
    )
    names.forget_nodes()
    return reports


def stays(node: fx.Node) -> bool:
    """Whether a node is no dead code. Placeholders must stay (the executable's calling convention),
    and so must effects. What has users stays in any case, and is not looked at."""
    return node.op == "placeholder" or bool(node.users) or node.is_impure()
