"""Runs the passes over a graph. Removing dead nodes, checks and timing happen only in this module.

The numeric check runs the graph after each pass node by node on copies of the first real inputs,
and compares it with the graph after `provenance`; the first stage that differs names the pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lorafx.capture.compiler_failures import failing_in
from lorafx.capture.record import Stage
from lorafx.errors import CaptureError, LoweringError, VerifyError
from lorafx.pass_order import CAPTURED, LOWERING_PASSES, GraphPass, way_around
from lorafx.passes.spec import GRAPH_PROMISES, STRUCTURE, Passed, output_values
from lorafx.program.context import Context
from lorafx.program.program import PassReport
from lorafx.program.promises import verify
from lorafx.torch_internals.graph_parts import tree_leaves

#: Receives the graph after each pass with its report; before the first one, the name of the stage.
AfterPass = Callable[[fx.GraphModule, Context, PassReport | str], None]


def run_passes(
    passes: Iterable[GraphPass],
    gm: fx.GraphModule,
    ctx: Context,
    after_pass: AfterPass,
    *,
    aten: bool = True,
) -> None:
    """Run passes over `gm`, in place. If it is AOTAutograd's (`aten`), dead nodes are removed after
    each, and the graph is checked. Of others only the structure is: nodes of Dynamo's write without
    a result, and neither its nodes nor those of Inductor need a fake value."""
    outputs = output_values(gm) if aten else ()
    for item in passes:
        start = time.perf_counter()
        error = LoweringError if item in LOWERING_PASSES else CaptureError
        with failing_in(f"the pass {item.name!r}", error, way_around(item)):
            edits = item.run(gm, ctx)
        if aten:
            for node in reversed(gm.graph.nodes):
                if not stays(node):
                    gm.graph.erase_node(node)
            gm.recompile()
            check_graph(item.name, gm, ctx, outputs)
        elif edits:
            gm.recompile()
            verify(STRUCTURE, Passed(gm, ctx, outputs), [item.name], ctx.program.options)
        seconds = time.perf_counter() - start
        after_pass(gm, ctx, PassReport(item.name, edits, seconds, len(gm.graph.nodes)))


def stays(node: fx.Node) -> bool:
    """Whether a node has users or must stay without any: as an input, or for its effect."""
    return node.op == "placeholder" or bool(node.users) or node.is_impure()


def check_graph(pass_name: str, gm: fx.GraphModule, ctx: Context, outputs: Sequence[Any]) -> None:
    """Raise VerifyError, naming the pass, if it broke a promise (lorafx.passes.spec).

    `outputs` are the captured graph's `output_values`."""
    ctx.passed.append(pass_name)
    verify(GRAPH_PROMISES, Passed(gm, ctx, outputs), ctx.passed, ctx.program.options)


#: The largest `difference` by dtype: orders of accumulation differ, and errors grow over layers.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def difference(got: Tensor, want: Tensor) -> float:
    """max |got − want| / max(1, max |want|); infinite for unequal shapes or non-finite numbers."""
    if got.shape != want.shape:
        return float("inf")
    if not want.numel():
        return 0.0
    scale = max(1.0, float(want.double().abs().max()))
    error = float((got.double() - want.double()).abs().max()) / scale
    return error if error == error else float("inf")


@dataclass
class NumericCheck:
    """Compares the stages of a graph on its first real inputs, and drops them then.

    These are AOTAutograd's graph, and it after each of `passes`. Dynamo's graph has other inputs,
    and what Inductor makes of a graph does not run node by node.
    """

    title: str
    passes: Sequence[GraphPass]
    stages: list[Stage]

    def run(self, arguments: Sequence[Any], *, mixed: bool) -> None:
        """Compare all stages on `arguments`; for mixed batches those from `provenance` on, since
        earlier ones know no owners. Raises VerifyError for the first stage that differs."""
        comparable = {CAPTURED, *(item.name for item in self.passes)}
        stages = [stage for stage in self.stages if stage.name in comparable]
        names = [stage.name for stage in stages]
        start = names.index("provenance") if mixed and "provenance" in names else 0
        # Stages before `match` lack the inputs that it adds for unmarked uses.
        stages = [stage for stage in stages[start:] if stage.input_count == len(arguments)]
        reference = _results(stages[0], arguments)
        for stage in stages[1:]:
            results = _results(stage, arguments)
            for index, (want, got) in enumerate(zip(reference, results, strict=True)):
                if not isinstance(want, Tensor):
                    continue
                error = difference(got, want)
                if error > (TOLERANCE.get(want.dtype, 1e-4) if want.is_floating_point() else 0):
                    wrong = next(item for item in self.passes if item.name == stage.name)
                    raise VerifyError(
                        f"{self.title}: after pass {stage.name!r} output {index} differs by "
                        f"{error:.3g} of its largest magnitude, or of 1 where that is less. To "
                        f"serve the model nevertheless, {way_around(wrong)}"
                    )
        self.stages = []


def _results(stage: Stage, arguments: Sequence[Any]) -> list[Any]:
    # Of copies: a graph may write into its arguments.
    copies = [item.clone() if isinstance(item, Tensor) else item for item in arguments]
    with torch.no_grad():
        return tree_leaves(stage.graph(*copies))
