"""Checks between passes: structure after each, and numbers against a reference on request.

Numeric verification keeps the graph of every stage. On the first real call each runs node by node
on copies of the inputs and is compared with the graph after `provenance`, whose site ops are plain
aten. The first stage that differs names the pass that is wrong.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from lorafx.capture.differences import difference, tolerance
from lorafx.errors import VerifyError
from lorafx.graph.context import Context
from lorafx.pass_order import CAPTURED, GraphPass, way_around
from lorafx.passes.outline.regions import bodies
from lorafx.program.frame import fake_value
from lorafx.torch_internals.operators import OpOverload
from lorafx.torch_internals.trees import tree_leaves


def check_graph(pass_name: str, gm: fx.GraphModule, ctx: Context, outputs: Sequence[Any]) -> None:
    """Structure, fake values, that the outputs still are `outputs`, and that no site was lost.

    Args:
        outputs: `output_values` of the graph as captured, or its `output_signature`.

    Raises:
        VerifyError: naming the pass, and what it broke.
    """
    try:
        gm.graph.lint()
    except (RuntimeError, AssertionError) as error:
        raise VerifyError(f"pass {pass_name!r} left a malformed graph: {error}") from error
    nodes = _with_bodies(gm)
    for node in nodes:
        if node.op == "call_function" and "val" not in node.meta and _returns(node):
            raise VerifyError(f"pass {pass_name!r} left node {node.name} without a fake value")
    values = output_values(gm)
    # Most passes leave the very values. Symbolic sizes are told only now: a pass may have made two
    # of them one.
    same = len(values) == len(outputs) and all(map(operator.is_, values, outputs))
    if not same and (before := _described(outputs)) != (after := _described(values)):
        raise VerifyError(
            f"pass {pass_name!r} changed the graph's outputs from {before} to {after}"
        )
    for node, states in ctx.states.items():
        if not all(place in nodes for place in ctx.homes.get(node, (node,))):
            paths = ", ".join(state.site.path for state in states)
            raise VerifyError(f"pass {pass_name!r} lost the LoRA of {paths} (node {node.name})")


def _with_bodies(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes of the graph and of the bodies that it calls."""
    graphs = [gm.graph, *(body.graph for _, body in bodies(gm))]
    return {node for graph in graphs for node in graph.nodes}


def _returns(node: fx.Node) -> bool:
    """False for operators that return nothing: assertions on sizes."""
    return not isinstance(node.target, OpOverload) or bool(node.target._schema.returns)


def output_signature(gm: fx.GraphModule) -> list[str]:
    """Shape and dtype of each of the graph's outputs."""
    return _described(output_values(gm))


def output_values(gm: fx.GraphModule) -> list[Any]:
    """The fake value of each of the graph's outputs."""
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


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph as it is now, with the bodies that it calls: passes and lowerings rewrite it."""
    kept = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    for name, body in bodies(gm):
        setattr(kept, name, fx.GraphModule(body, copy.deepcopy(body.graph)))
    return kept


def cloned(values: Sequence[Any]) -> list[Any]:
    """Arguments of a graph that it may write into."""
    return [item.clone() if isinstance(item, Tensor) else item for item in values]


@dataclass(frozen=True)
class _Stage:
    """A copy of the graph as the pass `name` left it."""

    name: str
    way_around: str
    graph: fx.GraphModule
    inputs: int


@dataclass
class NumericCheck:
    """The stages of one graph, run side by side on the first real inputs."""

    title: str
    stages: list[_Stage] = field(default_factory=list)
    #: What came out of it, in words.
    result: str = "numbers: the stages will be compared at the graph's first call"

    def keep(self, item: GraphPass | None, gm: fx.GraphModule) -> None:
        """Keep a copy of the graph after the pass; of the captured graph, where it is None."""
        inputs = sum(node.op == "placeholder" for node in gm.graph.nodes)
        kept = copied(gm)
        name, way_out = (item.name, way_around(item)) if item else (CAPTURED, "")
        self.stages.append(_Stage(name, way_out, kept, inputs))

    def run(self, arguments: Sequence[Any], *, mixed: bool) -> list[str]:
        """Compare all stages on `arguments`; returns the names of those compared.

        Stages before `provenance` know no rows and are left out for mixed batches.

        Raises:
            VerifyError: a stage computes something else than the first one.
        """
        names = [stage.name for stage in self.stages]
        start = names.index("provenance") if mixed and "provenance" in names else 0
        reference: list[Any] | None = None
        compared: list[str] = []
        largest = 0.0
        self.result = "numbers: a comparison of the stages was begun, and ended in an error"
        for stage in self.stages[start:]:
            if stage.inputs != len(arguments):  # before `match` added the inputs of unmarked uses
                continue
            given = cloned(arguments)
            with torch.no_grad():
                results = tree_leaves(stage.graph(*given))
            if reference is None:
                reference = results
            else:
                largest = max(largest, self._compare(stage, reference, results))
            compared.append(stage.name)
        self.stages.clear()
        self.result = (
            f"numbers: {len(compared)} stages agree, from {compared[0]} to {compared[-1]}; the "
            f"largest difference is {largest:.2g} of the largest magnitude"
        )
        return compared

    def _compare(self, stage: _Stage, reference: list[Any], results: list[Any]) -> float:
        """The largest difference, as `lorafx.capture.differences` has it."""
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
                raise VerifyError(
                    f"{self.title}: after pass {stage.name!r} output {index} differs by "
                    f"{error:.3g} of its largest magnitude, or of 1 where that is less. To serve "
                    f"the model nevertheless, {stage.way_around}"
                )
            largest = max(largest, error)
        return largest
