"""Lowerings: from graphs after the passes, and graphs without LoRA, to executables.

inductor    Inductor, with generated C++ kernels for the LoRA part; the base is torch.compile's
triton      the same with Triton kernels, for which `plan` and `lower` prepare the graph
reference   aten operators, run node by node; the base is eager
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import Tensor, fx

from lorafx.capture.record import Stage
from lorafx.config import Options
from lorafx.passes.check_order import FEW_SUMS
from lorafx.program.bodies import bodies
from lorafx.torch_internals.compat import mode_settings
from lorafx.torch_internals.graph_parts import OpOverload

aten = torch.ops.aten

#: A graph in AOTAutograd's boxed convention, and copies of it after each pass.
Boxed: TypeAlias = Callable[[list[Any]], Any]
Stages: TypeAlias = Sequence[Stage]


class Lowering(Protocol):
    """Compiles graphs with LoRA to executables in AOTAutograd's boxed convention.

    `replays`: they run the graph as it was after one of the passes, of which `stages` has copies;
    LOWERING_PASSES are not run.
    """

    @property
    def replays(self) -> bool: ...

    def decompositions(self) -> dict[Any, Callable[..., Any]]: ...

    def compile(self, gm: fx.GraphModule, inputs: Sequence[Any], stages: Stages = ()) -> Boxed: ...


def decomposition_table() -> dict[Any, Callable[..., Any]]:
    """Inductor's table without decompositions of matrix products, which `match` has to see."""
    from lorafx.torch_internals.inductor import select_decomp_table

    table = dict(select_decomp_table())
    for op in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.embedding):
        for overload in op.overloads():
            table.pop(getattr(op, overload), None)
    table[aten.cat.default] = partial(_cat_as_eager, table[aten.cat.default])
    return table


def _cat_as_eager(decomposed: Callable[..., Any], tensors: Sequence[Tensor], dim: int = 0) -> Any:
    """`torch.cat` without empty operands, laid out as in eager mode.

    Inductor keeps the layout of a single remaining tensor: a prompt's keys after an empty cache
    would be laid out unlike those of later steps, and each layout would need a graph of its own.
    """
    result = decomposed(tensors, dim)
    if result is NotImplemented or all(tensor is tensors[0] for tensor in tensors):
        return result
    return result.clone(memory_format=torch.contiguous_format)


#: Deltas are added in place into a product's output. Inductor's order by peak memory may move such
#: an op behind readers of its result: on torch 2.13, in a graph of 1,500 nodes, a router lost its
#: adapter.
_IN_ORDER = {"reorder_for_peak_memory": False}
#: Omits the timing code of generated modules, several lines for each input.
_NO_HARNESS = {"benchmark_harness": False}
#: Omits the comparison of each input and each operator's result with the sizes and strides that the
#: graph was compiled for: 0.15 ms of a step of 6 layers. Inputs are guarded or checked before, and
#: opcheck compares results of lorafx's operators with their fakes.
_NO_ASSERTS = {"size_asserts": False, "alignment_asserts": False}
#: Options(batch_invariant=True): numbers are rounded where the model does so, whatever is fused.
_ROUNDED = {"emulate_precision_casts": True}
#: The same where a graph has sums of a fixed number of rows, such as one: no threads share a sum.
_ONE_THREAD = {"cpp.min_chunk_size": sys.maxsize}
#: Namespaces of operators whose fakes are trusted.
_TESTED = ("aten", "prims", "lorafx")


@dataclass(frozen=True)
class InductorLowering:
    """Inductor, whose caches hash the rewritten graph, so a changed pass invalidates them.

    `patches` are settings, such as those for a `mode` of torch.compile; `asserts`: generated code
    compares all sizes and strides.
    """

    patches: Mapping[str, Any] = field(default_factory=dict)
    asserts: bool = False
    replays: bool = False

    def decompositions(self) -> dict[Any, Callable[..., Any]]:
        from lorafx.torch_internals.compat import inductor_config

        with inductor_config.patch(dict(self.patches)):
            return decomposition_table()

    def compile(self, gm: fx.GraphModule, inputs: Sequence[Any], stages: Stages = ()) -> Boxed:
        from lorafx.torch_internals.compat import inductor_config
        from lorafx.torch_internals.inductor import compile_fx_inner, get_static_input_idxs

        settings = {} if self.asserts or not _is_tested(gm, inputs) else _NO_ASSERTS
        few = _ONE_THREAD if gm.meta.get(FEW_SUMS) else {}
        with inductor_config.patch({**settings, **few, **self.patches, **_IN_ORDER, **_NO_HARNESS}):
            # What compile_fx does before its inner compile for inference, after LOWERING_PASSES.
            for module in (gm, *(body for _, body in bodies(gm))):
                output = module.graph.output_node()
                items: Any = output.args[0]
                output.meta["user_visible_output_idxs"] = [
                    index for index, item in enumerate(items) if isinstance(item, fx.Node)
                ]
            # Weights, packed weights and banks have fixed addresses; slots are copied in, as CUDA
            # graphs do with inputs that may move.
            fixed = get_static_input_idxs(0)
            return compile_fx_inner(gm, list(inputs), is_inference=True, static_input_idxs=fixed)


def _is_tested(gm: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether a graph runs on a CPU alone, and every operator's fake is torch's or lorafx's."""
    graphs = [gm.graph, *(body.graph for _, body in bodies(gm))]
    targets = [
        item for graph in graphs for node in graph.nodes for item in (node.target, *node.args)
    ]
    return all(op.namespace in _TESTED for op in targets if isinstance(op, OpOverload)) and all(
        value.device.type == "cpu" for value in inputs if isinstance(value, Tensor)
    )


class NodeByNode:
    """A graph run by the interpreter, in AOTAutograd's boxed convention."""

    _boxed_call = True

    def __init__(self, gm: fx.GraphModule) -> None:
        self.graph_module = gm
        self._forward = gm.forward

    def __call__(self, arguments: list[Any]) -> Any:
        return self._forward(*arguments)


class ReferenceLowering:
    replays = False

    def decompositions(self) -> dict[Any, Callable[..., Any]]:
        return decomposition_table()

    def compile(self, gm: fx.GraphModule, inputs: Sequence[Any], stages: Stages = ()) -> Boxed:
        return NodeByNode(gm)


def compile_base(
    lowering: Lowering, gm: fx.GraphModule, examples: Sequence[Any]
) -> Callable[..., Any]:
    """The executable of a graph without LoRA: torch.compile's, or the graph itself."""
    if not isinstance(lowering, InductorLowering):
        return gm.forward
    from lorafx.torch_internals.inductor import compile_fx

    # A backward compiled later needs the settings too.
    compiled = compile_fx(gm, list(examples), config_patches=dict(lowering.patches))
    return cast("Callable[..., Any]", compiled)


def lowering_for(options: Options, patches: Mapping[str, Any] | None = None) -> Lowering:
    """The lowering named by `Options.lowering`, with settings `patches` of Inductor."""
    if options.lowering == "reference":
        return ReferenceLowering()
    rounded = _ROUNDED if options.batch_invariant else {}
    return InductorLowering(
        {**mode_settings(options.mode), **rounded, **(patches or {})},
        asserts=options.verify == "numeric",
    )
