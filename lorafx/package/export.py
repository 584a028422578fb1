"""Exports a model with LoRA: its proved graph in plain aten, compiled by AOTInductor.

    model → marks, capture, GRAPH_PASSES → graph(weights, banks, slots, arguments)
          → torch.export of (slots, *arguments) → outputs, with weights and banks as constants
          → AOTInductor → m.pt2, with a description as JSON in its metadata

The graph is captured from a call with the example inputs, and is the one that the reference
lowering would run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from lorafx.api import compile as compile_model
from lorafx.capture.backend import Backend
from lorafx.capture.compilation import Compilation, Observer
from lorafx.capture.lowering import Boxed, ReferenceLowering, Stages
from lorafx.compiled_model.compiled import CompiledModel
from lorafx.config import Options
from lorafx.errors import (
    CaptureError,
    ConfigError,
    LoweringError,
    ProvenanceError,
    UnsupportedAdapterError,
)
from lorafx.inspection.viewer.dump import Dumps
from lorafx.model.sites import room_of
from lorafx.package.exported_graph import PLAIN, ExportedGraph, failing_compiler
from lorafx.package.stand_in import KEY, constants_of, described, substitute_for
from lorafx.program.argument_roles import RoleTable
from lorafx.program.program import Program
from lorafx.runtime.entry import entered
from lorafx.runtime.example_inputs import as_call, named_inputs
from lorafx.torch_internals.dynamo import InputMutationAOTOutput

#: One graph for all calls, with the site ops apart from the base's products.
_OPTIONS = Options(
    lowering="reference",
    start="compiled",
    base_graphs=False,
    cache=None,
    passes={"pack": False, "fuse": False, "outline": False},
)
#: Assertions run before what they protect.
_IN_ORDER = {"reorder_for_peak_memory": False}


def export(
    model: nn.Module,
    lora_config: Any,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    path: str | os.PathLike[str],
    *,
    adapters: Mapping[str, Any] | Sequence[Any] | None = None,
) -> str:
    """Write `model` as a package, which `lorafx.load`, `torch._inductor.aoti_load_package` and C++
    run without the model's code (docs/guides/export.md). Returns its path.

    The package holds the base's weights, empty banks and code for this processor. Each row of a
    batch has its own adapter, by the slots that are the first input. Batch and lengths are dynamic
    where the example has at least two of them. The model is on a CPU, and as before afterwards.

    Args:
        lora_config: as for `lorafx.compile`. Adapters that it names choose the sites, the ranks and
            the slots; they are not in the package.
        example_inputs: keyword arguments (or positional ones) of a call with at least two requests.
            Values other than tensors (`{"use_cache": False}`) become constants.
        path: the file to write, ending in ".pt2".
        adapters: as for `lorafx.compile`.

    Raises, with the model as it was:
        ConfigError: an argument that cannot be honoured; outputs or arguments that are no tensors,
            such as caches.
        TargetError: a site that is neither a linear nor an embedding.
        UnsupportedAdapterError: DoRA, biases or weights of adapters' own.
        ProvenanceError, MatchError: not every site can be served in mixed batches.
        CaptureError: the model is no single graph, is not on a CPU, or torch.export fails.
        LoweringError: AOTInductor fails.

    It also raises what `lorafx.compile` and the call raise.
    """
    path = os.fspath(path)
    if not path.endswith(".pt2"):
        raise ConfigError(f"the path of a package ends in .pt2, got {path!r}")
    compiled = compile_model(model, lora_config, adapters=adapters, options=_OPTIONS)
    try:
        sites = _described(compiled._session.program)
        graph = captured(compiled, example_inputs)
        program = graph.exported()
        with failing_compiler("AOTInductor", LoweringError, graph.model):
            from lorafx.torch_internals.aoti import aoti_compile_and_package

            metadata = {KEY: json.dumps(graph.description() | sites)}
            settings = {"aot_inductor.metadata": metadata, **_IN_ORDER}
            return aoti_compile_and_package(program, package_path=path, inductor_configs=settings)
    finally:
        compiled.detach()


def _described(program: Program) -> dict[str, Any]:
    """`described`, where all of the program can be exported."""
    if program.runtime.device.type != "cpu":
        raise CaptureError(
            f"the model is on {program.runtime.device}, and packages are made for CPUs; move it "
            'there: model.to("cpu")'
        )
    if rooms := room_of(program.groups):
        way, pair = "leave these adapters and settings out", program.config.scaled_pair
        if pair is not None:
            way = f"give LoraConfig(max_rank={len(pair[0])}), for factors of VeRA adapters"
        raise UnsupportedAdapterError(
            f"packages hold low-rank factors alone, without {', '.join(rooms)}; {way}, or merge "
            "the adapter by export_merged(name, folder)"
        )
    if program.config.slot_rank is not None:
        raise ConfigError("LoraConfig.slot_rank is not exported; leave it out")
    sites = described(program)
    banks, expected = constants_of(substitute_for(sites).groups), constants_of(program.groups)
    if {k: v.shape for k, v in banks.items()} != {k: v.shape for k, v in expected.items()}:
        raise CaptureError("without the model its sites would not have the same banks")
    return sites


class _Recording(ReferenceLowering, Observer):
    """Runs graphs node by node, and keeps them, and their arguments and results."""

    def __init__(self) -> None:
        self.graphs: list[Compilation] = []
        self.runs: list[tuple[fx.GraphModule, list[Any], list[Any]]] = []

    def compiled(self, compilation: Compilation) -> None:
        self.graphs.append(compilation)

    def compile(self, gm: fx.GraphModule, inputs: Sequence[Any], stages: Stages = ()) -> Boxed:
        def run(arguments: list[Any]) -> Any:
            results = gm.forward(*arguments)
            self.runs.append((gm, arguments, list(results)))
            return results

        return run


def captured(compiled: CompiledModel, example_inputs: Any) -> ExportedGraph:
    """The graph of a call with these inputs, without an adapter. Raises as `export`."""
    session = compiled._session
    program = session.program
    args, kwargs = as_call(example_inputs)
    named = named_inputs(RoleTable(program.model, program.config.row_dims), example_inputs)
    for name, value in named.items():
        if not isinstance(value, (Tensor, *PLAIN)):
            raise ConfigError(
                f"the argument {name!r} is a {type(value).__name__}; arguments of an exported "
                "model are tensors, beside plain values, and caches are not exported"
            )
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if len(set(map(id, tensors.values()))) < len(tensors):
        raise ConfigError("two arguments of the example are one tensor; give a copy of it")
    compiled.set_adapter(None)  # PEFT's active adapter
    recording = _Recording()
    session.backend = Backend(
        program, entered, lowering=recording, observers=[recording, Dumps(session)]
    )
    output = compiled(*args, **kwargs)
    model = type(program.model).__name__
    if len(recording.runs) != 1 or len(recording.graphs) != 1:
        raise CaptureError(
            f"{model} runs in {len(recording.graphs)} graphs with Python between them, and a "
            "package holds one; TORCH_LOGS=graph_breaks says where they break"
        )
    gm, values, results = recording.runs[0]
    (compilation,) = recording.graphs
    _refuse(compilation, gm, model)
    graph = ExportedGraph(program, gm)
    graph.take_inputs(compilation.frame, values, tensors)
    graph.form = graph.take_output(output, results)
    return graph


def _refuse(graph: Compilation, gm: fx.GraphModule, model: str) -> None:
    for refusal in graph.record.checks.refusals:
        sites = ", ".join(refusal.sites)
        if refusal.when == "always":
            raise refusal.error(sites)
        if refusal.when == "mixed":
            raise ProvenanceError(
                f"at {sites} it is not proved which request a row belongs to, so a package could "
                f"not mix adapters there: {refusal.reason}. Declare which dimension of an "
                "argument holds the requests by LoraConfig(row_dims=...), or leave the module out "
                "by exclude_modules"
            )
    written = gm.graph.output_node().meta.get("desc") or ()
    if any(isinstance(item, InputMutationAOTOutput) for item in written):
        raise CaptureError(
            f"{model} writes into its arguments or buffers while it runs, which a package does not"
        )
