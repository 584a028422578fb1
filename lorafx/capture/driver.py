"""Runs the passes over a graph. Only this module cleans, checks and times.

The numeric check compares the graph after each pass with the graph after `provenance`, node by node
on copies of the first real inputs; the first stage that differs names the wrong pass.

Compiler failures become errors of lorafx, with the failing part, the graph and the way out.
AOTAutograd and Dynamo wrap errors or check their class. So an error passes unchanged, with a note
of its origin, and is converted outside Dynamo.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lorafx.capture.record import Stage
from lorafx.errors import CaptureError, LorafxError, UnsupportedVersionError, VerifyError
from lorafx.pass_order import GraphPass, pipeline, way_around
from lorafx.passes.outline.outline import bodies
from lorafx.program.context import Context
from lorafx.program.frame import fake_value
from lorafx.program.program import PassReport
from lorafx.torch_internals.dynamo import ObservedException, TorchDynamoException, TorchRuntimeError
from lorafx.torch_internals.graph_parts import OpOverload, tree_leaves
from lorafx.torch_internals.versions import installed, unsupported

#: Receives the captured graph (with None), then the graph after each pass with its report.
AfterPass = Callable[[fx.GraphModule, Context, PassReport | None], None]


def run_pipeline(gm: fx.GraphModule, ctx: Context, after_pass: AfterPass) -> None:
    """Run all enabled passes over `gm`, in place."""
    options = ctx.program.options
    outputs = output_values(gm)
    after_pass(gm, ctx, None)

    for item in pipeline(options).graph:
        start = time.perf_counter()
        with failing_in(f"the pass {item.name!r}", CaptureError, way_around(item)):
            edits = item.run(gm, ctx)
        for node in reversed(gm.graph.nodes):
            if not stays(node):
                gm.graph.erase_node(node)
        gm.recompile()
        check_graph(item.name, gm, ctx, outputs)
        seconds = time.perf_counter() - start
        after_pass(gm, ctx, PassReport(item.name, edits, seconds, len(gm.graph.nodes)))


def stays(node: fx.Node) -> bool:
    """Whether a node without users must stay: placeholders (the calling convention) and effects."""
    return node.op == "placeholder" or bool(node.users) or node.is_impure()


def check_graph(pass_name: str, gm: fx.GraphModule, ctx: Context, outputs: Sequence[Any]) -> None:
    """Raise VerifyError, naming the pass, for a broken structure or fake value, a lost site, or
    changed `outputs` (the captured graph's `output_values`)."""
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


#: Of `difference`, by dtype: orders of accumulation differ, and errors grow over layers.
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


def cloned(values: Sequence[Any]) -> list[Any]:
    """Copies of arguments that a graph may write into."""
    return [item.clone() if isinstance(item, Tensor) else item for item in values]


@dataclass
class NumericCheck:
    """The stages of a graph, compared on the first real inputs and then dropped."""

    title: str
    passes: Sequence[GraphPass]
    stages: list[Stage]

    def run(self, arguments: Sequence[Any], *, mixed: bool) -> None:
        """Compare all stages on `arguments`; mixed batches start at `provenance`, since earlier
        stages know no rows. Raises VerifyError for a stage that differs."""
        names = [stage.name for stage in self.stages]
        start = names.index("provenance") if mixed and "provenance" in names else 0
        # Fewer inputs: stages before `match` added those of unmarked uses.
        stages = [stage for stage in self.stages[start:] if stage.input_count == len(arguments)]
        reference = _results(stages[0], arguments)
        for stage in stages[1:]:
            results = _results(stage, arguments)
            for index, (want, got) in enumerate(zip(reference, results, strict=True)):
                if not isinstance(want, Tensor):
                    continue
                error = difference(got, want)
                if error > (TOLERANCE.get(want.dtype, 1e-4) if want.is_floating_point() else 0):
                    item = next(item for item in self.passes if item.name == stage.name)
                    raise VerifyError(
                        f"{self.title}: after pass {stage.name!r} output {index} differs by "
                        f"{error:.3g} of its largest magnitude, or of 1 where that is less. To "
                        f"serve the model nevertheless, {way_around(item)}"
                    )
        self.stages = []


def _results(stage: Stage, arguments: Sequence[Any]) -> list[Any]:
    with torch.no_grad():
        return tree_leaves(stage.graph(*cloned(arguments)))


_NOTE = "_lorafx_failed_in"
KEEP_OUT = "use torch.compiler.disable on the functions that cannot be traced"
_SHOWN = 400  # characters of the compiler's own message; the whole of it is the cause


@dataclass(frozen=True)
class _Place:
    what: str
    error: type[LorafxError]
    way_out: str


@contextmanager
def failing_in(what: str, error: type[LorafxError], way_out: str) -> Iterator[None]:
    """Notes on exceptions where they arose; for the caller they become an `error` with a
    `way_out`."""
    try:
        yield
    except Exception as raised:
        if not hasattr(raised, _NOTE):
            setattr(raised, _NOTE, _Place(what, error, way_out))
        raise


def own_error(raised: BaseException) -> LorafxError | None:
    """lorafx's error inside an error of Dynamo or Inductor."""
    return next((item for item in chain(raised)[1:] if isinstance(item, LorafxError)), None)


def explained(raised: BaseException, model: str, base: str = "") -> LorafxError | None:
    """The lorafx error for a compiler failure on a graph of `model`; None for errors of the model
    or its arguments. `base` tells what happens to calls without an adapter."""
    errors = chain(raised)
    place = next((getattr(item, _NOTE) for item in errors if hasattr(item, _NOTE)), None)
    if place is None and not _is_of_dynamo(raised):
        return None
    version = unsupported(errors[-1], directly=True)
    if version is not None:
        return UnsupportedVersionError(f"{version}. {base}".rstrip())
    place = place or _Place("Dynamo", CaptureError, KEEP_OUT)
    text = " ".join(str(errors[-1]).split())
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    if isinstance(errors[-1], OSError) and ".so" in text:
        shown += "; delete that library, which a killed process may have left half written"
    return place.error(
        f"{place.what} failed on a graph of {model}: {type(errors[-1]).__name__}: {shown} (torch "
        f"{installed('torch')}). To serve it nevertheless, {place.way_out}. {base}".rstrip()
    )


def chain(raised: BaseException) -> list[BaseException]:
    """The error, and the errors that Dynamo and Inductor have wrapped."""
    found = [raised]
    while isinstance(inner := getattr(found[-1], "inner_exception", None), BaseException):
        if inner in found:
            break
        found.append(inner)
    return found


def _is_of_dynamo(raised: BaseException) -> bool:
    # An operator refusing its arguments is the model's error.
    models = (TorchRuntimeError, ObservedException)
    return isinstance(raised, TorchDynamoException) and not isinstance(raised, models)
