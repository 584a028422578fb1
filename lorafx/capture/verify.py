"""Checks between passes: structure after each, and numbers against a reference on request.

On the first real call each stage runs node by node on copies of the inputs and is compared with the
graph after `provenance`, whose site ops are plain aten. The first stage that differs names the
wrong pass.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lorafx.capture.recorder import Stage
from lorafx.config import Options
from lorafx.errors import VerifyError
from lorafx.pass_order import pipeline, way_around
from lorafx.passes.outline.outline import bodies
from lorafx.program.context import Context
from lorafx.program.frame import fake_value
from lorafx.torch_internals.operators import OpOverload
from lorafx.torch_internals.trees import tree_leaves

#: Tolerances of `difference`: the order of accumulation differs between stages, and errors grow
#: over layers.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def tolerance(dtype: torch.dtype) -> float:
    return _TOLERANCE.get(dtype, 1e-4)


def difference(got: Tensor, want: Tensor) -> float:
    """max |got − want| / max(1, max |want|); infinite for unequal shapes or non-finite numbers."""
    if got.shape != want.shape:
        return float("inf")
    if not want.numel():
        return 0.0
    scale = max(1.0, float(want.double().abs().max()))
    error = float((got.double() - want.double()).abs().max()) / scale
    return error if error == error else float("inf")


def check_graph(pass_name: str, gm: fx.GraphModule, ctx: Context, outputs: Sequence[Any]) -> None:
    """Raise VerifyError, naming the pass, for a broken structure or fake value, a lost site, or
    changed `outputs` (the captured graph's `output_values` or `output_signature`)."""
    try:
        gm.graph.lint()
    except (RuntimeError, AssertionError) as error:
        raise VerifyError(f"pass {pass_name!r} left a malformed graph: {error}") from error
    graphs = [gm.graph, *(body.graph for _, body in bodies(gm))]
    nodes = {node for graph in graphs for node in graph.nodes}
    for node in nodes:
        if node.op == "call_function" and "val" not in node.meta and _returns(node):
            raise VerifyError(f"pass {pass_name!r} left node {node.name} without a fake value")
    values = output_values(gm)
    # Most passes keep the values. Texts of symbolic sizes are compared late, since a pass may unify
    # sizes.
    same = len(values) == len(outputs) and all(map(operator.is_, values, outputs))
    if not same and (before := _described(outputs)) != (after := _described(values)):
        raise VerifyError(
            f"pass {pass_name!r} changed the graph's outputs from {before} to {after}"
        )
    for node, states in ctx.states.items():
        if not all(place in nodes for place in ctx.homes.get(node, (node,))):
            paths = ", ".join(state.site.path for state in states)
            raise VerifyError(f"pass {pass_name!r} lost the LoRA of {paths} (node {node.name})")


def _returns(node: fx.Node) -> bool:
    return not isinstance(node.target, OpOverload) or bool(node.target._schema.returns)


def output_signature(gm: fx.GraphModule) -> list[str]:
    """Shapes and dtypes of the outputs."""
    return _described(output_values(gm))


def output_values(gm: fx.GraphModule) -> list[Any]:
    """The outputs' fake values."""
    output = next(node for node in gm.graph.nodes if node.op == "output")
    return [
        fake_value(item) if isinstance(item, fx.Node) else item
        for item in tree_leaves(output.args[0])
    ]


def _described(values: Sequence[Any]) -> list[str]:
    return [
        f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else str(value)
        for value in values
    ]


def cloned(values: Sequence[Any]) -> list[Any]:
    """Copies of arguments that a graph may write into."""
    return [item.clone() if isinstance(item, Tensor) else item for item in values]


@dataclass
class NumericCheck:
    """The stages of a graph, compared on the first real inputs and then dropped."""

    title: str
    options: Options
    stages: list[Stage]
    result: str = "numbers: the stages will be compared at the graph's first call"

    def run(self, arguments: Sequence[Any], *, mixed: bool) -> None:
        """Compare all stages on `arguments`; mixed batches start at `provenance`, since earlier
        stages know no rows. Raises VerifyError for a stage that differs."""
        names = [stage.name for stage in self.stages]
        start = names.index("provenance") if mixed and "provenance" in names else 0
        # Fewer inputs: stages before `match` added those of unmarked uses.
        stages = [stage for stage in self.stages[start:] if stage.input_count == len(arguments)]
        self.result = "numbers: a comparison of the stages was begun, and ended in an error"
        reference, largest = _results(stages[0], arguments), 0.0
        for stage in stages[1:]:
            largest = max(largest, self._compare(stage, reference, _results(stage, arguments)))
        self.stages = []
        self.result = (
            f"numbers: {len(stages)} stages agree, from {stages[0].name} to {stages[-1].name}; the "
            f"largest difference is {largest:.2g} of the largest magnitude"
        )

    def _compare(self, stage: Stage, reference: list[Any], results: list[Any]) -> float:
        largest = 0.0
        for index, (want, got) in enumerate(zip(reference, results, strict=True)):
            if not isinstance(want, Tensor):
                continue
            if not want.is_floating_point():
                if not torch.equal(want, got):
                    self.result = f"numbers: pass {stage.name!r} changed output {index}"
                    raise VerifyError(f"{self.title}: pass {stage.name!r} changed output {index}")
                continue
            error = difference(got, want)
            if error > tolerance(want.dtype):
                self.result = f"numbers: pass {stage.name!r} changed them, by {error:.3g}"
                passes = pipeline(self.options).graph
                item = next(item for item in passes if item.name == stage.name)
                raise VerifyError(
                    f"{self.title}: after pass {stage.name!r} output {index} differs by "
                    f"{error:.3g} of its largest magnitude, or of 1 where that is less. To serve "
                    f"the model nevertheless, {way_around(item)}"
                )
            largest = max(largest, error)
        return largest


def _results(stage: Stage, arguments: Sequence[Any]) -> list[Any]:
    with torch.no_grad():
        return tree_leaves(stage.graph(*cloned(arguments)))
