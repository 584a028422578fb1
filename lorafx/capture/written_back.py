"""Outlined layers write into caches that are otherwise unread inputs.

    before      k1, h1 = body(h0; K1, W1)     AOTAutograd overwrites K1 with k1 after the graph
    after       h1 = body(h0; K1, W1)         the body ends in K1.copy_(k1), the graph returns K1

AOTAutograd makes graphs functional, so writing a token's keys into a fixed-size cache would copy
the cache twice at each step. A body that ends in a copy into its operand lets Inductor write in
place.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from lorafx.passes.outline.outline import INVOKE
from lorafx.program.frame import fake_value
from lorafx.torch_internals.dynamo import InputMutationAOTOutput
from lorafx.torch_internals.frames import size_expression

#: Arguments of a call before the operands: the body and its name.
_OPERANDS = 2


def write_back(gm: fx.GraphModule) -> int:
    """Rewrite the outlined bodies of `gm`, in place; returns the number of inputs they write. Only
    on a CPU: elsewhere CUDA graphs and copies of unaligned inputs need the written inputs."""
    calls: dict[str, list[fx.Node]] = {}
    for call in gm.graph.find_nodes(op="call_function", target=INVOKE):
        calls.setdefault(str(call.args[1]), []).append(call)
    written = _written(gm)
    edits = 0
    for group in calls.values():
        found = [dict(_pairs(call, written)) for call in group]
        common = {
            result: operand
            for result, operand in found[0].items()
            if all(pairs.get(result) == operand for pairs in found)
        }
        body = getattr(gm, str(group[0].args[0].target))  # type: ignore[union-attr]
        common = _allowed(body, common)
        if common:
            _change(gm, body, group, common, written)
            edits += len(common) * len(group)
    if edits:
        gm.graph.lint()
        gm.recompile()
    return edits


def _written(gm: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    output = gm.graph.output_node()
    items: Any = output.args[0]
    descriptions = output.meta.get("desc") or ()
    if len(descriptions) != len(items):
        return {}
    inputs = {node.meta.get("desc"): node for node in gm.graph.find_nodes(op="placeholder")}
    found: dict[fx.Node, fx.Node] = {}
    for item, desc in zip(items, descriptions, strict=True):
        place = inputs.get(desc.mutated_input) if isinstance(desc, InputMutationAOTOutput) else None
        if place is not None and isinstance(item, fx.Node) and items.count(item) == 1:
            found[item] = place
    return found


def _pairs(call: fx.Node, written: dict[fx.Node, fx.Node]) -> Iterator[tuple[int, int]]:
    """(result, operand) indices of results only copied into inputs that only `call` takes."""
    operands: Sequence[Any] = call.args[_OPERANDS:]
    for item in call.users:
        place = written.get(item)
        if place is None or item.target is not operator.getitem:
            continue
        if len(item.users) > 1 or set(place.users) != {call} or operands.count(place) != 1:
            continue
        if fake_value(place).device.type == "cpu" and _alike(fake_value(item), fake_value(place)):
            yield item.args[1], operands.index(place)  # type: ignore[misc]


def _alike(value: Any, place: Any) -> bool:
    def layout(tensor: torch.Tensor) -> tuple[Any, ...]:
        numbers = (*tensor.shape, *tensor.stride())
        return (tensor.dtype, tensor.device, *map(size_expression, numbers))

    return layout(value) == layout(place)


def _allowed(body: fx.GraphModule, pairs: dict[int, int]) -> dict[int, int]:
    """The pairs that the body may write: new values, returned once, beside another result."""
    results: Any = body.graph.output_node().args[0]
    found = {
        result: operand
        for result, operand in pairs.items()
        if isinstance(results[result], fx.Node)
        and results[result].op == "call_function"
        and list(results).count(results[result]) == 1
    }
    several = len({*found.values()}) == len(found)
    return found if several and len(found) < len(results) else {}


def _change(
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
