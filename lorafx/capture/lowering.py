"""Lowerings: from graphs after the passes, and graphs without LoRA, to executables.

inductor    Inductor, with generated C++ kernels for the LoRA part; the base is torch.compile's
triton      the same with Triton kernels, for which `plan` and `lower` prepare the graph
reference   aten operators, run node by node; the base is eager
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx

from lorafx.config import Options
from lorafx.passes.outline.outline import INVOKE, bodies, is_view
from lorafx.program.frame import fake_value
from lorafx.torch_internals.compat import mode_settings
from lorafx.torch_internals.dynamo import InputMutationAOTOutput
from lorafx.torch_internals.frames import size_expression
from lorafx.torch_internals.graph_parts import OpOverload
from lorafx.torch_internals.shortcuts import chosen

aten = torch.ops.aten


class Lowering(Protocol):
    """Compiles graphs with LoRA to executables in AOTAutograd's boxed convention."""

    def decompositions(self) -> dict[Any, Callable[..., Any]]: ...

    def compile(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[[list[Any]], Any]: ...


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
#: Namespaces of operators whose fakes are trusted.
_TESTED = ("aten", "prims", "lorafx")


@dataclass(frozen=True)
class InductorLowering:
    """Inductor, whose caches hash the rewritten graph, so a changed pass invalidates them.

    `patches` are settings for a `mode` of torch.compile; `writes_back`: `write_back` is run;
    `asserts`: generated code compares all sizes and strides.
    """

    patches: Mapping[str, Any] = field(default_factory=dict)
    writes_back: bool = False
    asserts: bool = False

    def decompositions(self) -> dict[Any, Callable[..., Any]]:
        from lorafx.torch_internals.compat import inductor_config

        with inductor_config.patch(dict(self.patches)):
            return decomposition_table()

    def compile(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[[list[Any]], Any]:
        from lorafx.torch_internals.compat import inductor_config
        from lorafx.torch_internals.inductor import (
            _recursive_joint_graph_passes,
            compile_fx_inner,
            get_static_input_idxs,
        )

        if self.writes_back:
            write_back(gm)
        settings = {} if self.asserts or not _is_tested(gm, inputs) else _NO_ASSERTS
        with inductor_config.patch({**settings, **self.patches, **_IN_ORDER, **_NO_HARNESS}):
            # What compile_fx does before its inner compile for inference.
            results: Any = gm.graph.output_node().args[0]
            memory = [_base_of(item) for item in results]
            gm = _recursive_joint_graph_passes(gm)
            _copy_returned_inputs(gm, memory)
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


def _base_of(item: Any) -> Any:
    while isinstance(item, fx.Node) and is_view(item) and isinstance(item.args[0], fx.Node):
        item = item.args[0]
    return item


def _copy_returned_inputs(gm: fx.GraphModule, memory: Sequence[Any]) -> None:
    """Copy results that have become inputs or views of inputs, as of `n + 0`, since AOTAutograd
    overwrites inputs after the graph. `memory`: the bases of the results that AOTAutograd knew."""
    output = gm.graph.output_node()
    items: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    changed = False
    for place, (item, before) in enumerate(zip(items, memory, strict=True)):
        base = _base_of(item)
        became_input = isinstance(base, fx.Node) and base.op == "placeholder"
        if not became_input or base is before or not isinstance(fake_value(base), Tensor):
            continue
        user = item if item is not base else output
        while user is not output and user.args[0] is not base:
            user = user.args[0]
        with gm.graph.inserting_before(user):
            copy = gm.graph.call_function(torch.ops.aten.clone.default, (base,))
        copy.meta.update(val=fake_value(base).clone())
        if user is output:
            items[place] = copy
        else:
            user.replace_input_with(base, copy)
        changed = True
    if changed:
        output.args = (tuple(items),)
        gm.recompile()


class NodeByNode:
    """A graph run by the interpreter, in AOTAutograd's boxed convention."""

    _boxed_call = True

    def __init__(self, gm: fx.GraphModule) -> None:
        self.graph_module = gm
        self._forward = gm.forward

    def __call__(self, arguments: list[Any]) -> Any:
        return self._forward(*arguments)


class ReferenceLowering:
    def decompositions(self) -> dict[Any, Callable[..., Any]]:
        return decomposition_table()

    def compile(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[[list[Any]], Any]:
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
    return InductorLowering(
        {**mode_settings(options.mode), **(patches or {})},
        writes_back="written_back" in chosen(options.shortcuts),
        asserts=options.verify == "numeric",
    )


#: The position of the first operand in a call's arguments, behind the body and its name.
_OPERANDS = 2


def write_back(gm: fx.GraphModule) -> int:
    """Rewrite the outlined bodies of `gm` in place, so that they write into inputs such as caches,
    which nothing else reads; return how many inputs their calls write.

        before      k1, h1 = body(h0; K1, W1)     AOTAutograd overwrites K1 with k1 after the graph
        after       h1 = body(h0; K1, W1)         the body ends in K1.copy_(k1), which Inductor
                                                  does in place

    AOTAutograd makes graphs functional, so writing a token's keys into a fixed-size cache would
    copy the cache twice at each step. This is done only on a CPU: elsewhere CUDA graphs and copies
    of unaligned inputs rely on inputs being written after the graph.
    """
    calls: dict[str, list[fx.Node]] = {}
    for call in gm.graph.find_nodes(op="call_function", target=INVOKE):
        calls.setdefault(str(call.args[1]), []).append(call)
    written = _written_inputs(gm)
    edits = 0
    for group in calls.values():
        writable = [dict(_writable_results(call, written)) for call in group]
        common = {
            result: operand
            for result, operand in writable[0].items()
            if all(pairs.get(result) == operand for pairs in writable)
        }
        body = getattr(gm, str(group[0].args[0].target))  # type: ignore[union-attr]
        common = _writable_by_body(body, common)
        if common:
            _write_in_body(gm, body, group, common, written)
            edits += len(common) * len(group)
    if edits:
        gm.graph.lint()
        gm.recompile()
    return edits


def _written_inputs(gm: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """The inputs that AOTAutograd overwrites after the graph, by the results that it copies."""
    output = gm.graph.output_node()
    items: Any = output.args[0]
    descriptions = output.meta.get("desc") or ()
    if len(descriptions) != len(items):
        return {}
    inputs = {node.meta.get("desc"): node for node in gm.graph.find_nodes(op="placeholder")}
    written: dict[fx.Node, fx.Node] = {}
    for item, desc in zip(items, descriptions, strict=True):
        place = inputs.get(desc.mutated_input) if isinstance(desc, InputMutationAOTOutput) else None
        if place is not None and isinstance(item, fx.Node) and items.count(item) == 1:
            written[item] = place
    return written


def _writable_results(call: fx.Node, written: dict[fx.Node, fx.Node]) -> Iterator[tuple[int, int]]:
    """(result, operand) indices of results only copied into inputs that only `call` reads."""
    operands: Sequence[Any] = call.args[_OPERANDS:]
    for item in call.users:
        place = written.get(item)
        if place is None or item.target is not operator.getitem:
            continue
        if len(item.users) > 1 or set(place.users) != {call} or operands.count(place) != 1:
            continue
        result, operand = fake_value(item), fake_value(place)
        if operand.device.type == "cpu" and _same_layout(result, operand):
            yield item.args[1], operands.index(place)  # type: ignore[misc]


def _same_layout(result: Any, operand: Any) -> bool:
    def layout(tensor: torch.Tensor) -> tuple[Any, ...]:
        numbers = (*tensor.shape, *tensor.stride())
        return (tensor.dtype, tensor.device, *map(size_expression, numbers))

    return layout(result) == layout(operand)


def _writable_by_body(body: fx.GraphModule, pairs: dict[int, int]) -> dict[int, int]:
    """The pairs that the body may write: new values, returned once, beside another result."""
    results: Any = body.graph.output_node().args[0]
    writable = {
        result: operand
        for result, operand in pairs.items()
        if isinstance(results[result], fx.Node)
        and results[result].op == "call_function"
        and list(results).count(results[result]) == 1
    }
    different = len({*writable.values()}) == len(writable)
    return writable if different and len(writable) < len(results) else {}


def _write_in_body(
    gm: fx.GraphModule,
    body: fx.GraphModule,
    calls: Sequence[fx.Node],
    pairs: dict[int, int],
    written: dict[fx.Node, fx.Node],
) -> None:
    graph, output = body.graph, body.graph.output_node()
    operands = graph.find_nodes(op="placeholder")
    results: Any = output.args[0]
    with graph.inserting_before(output):
        for result, operand in pairs.items():
            copy = graph.call_function(
                torch.ops.aten.copy_.default, (operands[operand], results[result])
            )
            copy.meta["val"] = fake_value(operands[operand])
    kept = [place for place in range(len(results)) if place not in pairs]
    output.args = (tuple(results[place] for place in kept),)
    body.recompile()
    for call in calls:
        values = call.meta["val"]
        call.meta["val"] = tuple(values[place] for place in kept)
        for item in list(call.users):
            place: Any = item.args[1]
            if place in pairs:
                item.replace_all_uses_with(written[item])
                gm.graph.erase_node(item)
            else:
                item.update_arg(1, kept.index(place))
