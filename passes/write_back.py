"""Outlined layers write into inputs such as caches, which nothing else reads.

    before      k1, h1 = body(h0; K1, W1)     AOTAutograd overwrites K1 with k1 after the graph
    after       h1 = body(h0; K1, W1)         the body ends in K1.copy_(k1), which Inductor does
                                              in place

AOTAutograd makes graphs functional, so writing a token's keys into a fixed-size cache would copy
the cache twice at each step. This is done only on a CPU: elsewhere CUDA graphs and copies of
unaligned inputs rely on inputs being written after the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lorafx.program.bodies import INVOKE
from lorafx.program.context import Context
from lorafx.program.frame import fake_value
from lorafx.torch_internals.dynamo import InputMutationAOTOutput
from lorafx.torch_internals.frames import size_expression
from lorafx.torch_internals.shortcuts import chosen

#: The position of the first operand in a call's arguments, behind the body and its name.
_OPERANDS = 2


@dataclass(frozen=True)
class WriteBack:
    """Outlined layers write into caches of a fixed size themselves."""

    name: str = "write_back"
    required: bool = False

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        options = ctx.program.options
        if options.lowering == "reference" or "written_back" not in chosen(options.shortcuts):
            return 0
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
