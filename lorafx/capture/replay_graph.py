"""Operators and inputs of a layer that Dynamo traces, and those of one that is replayed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, fx
from torch._dynamo.variables.builder import VariableBuilder
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from lorafx.capture.replay_arguments import NotAlike, same_layout
from lorafx.capture.replay_calls import Stacks
from lorafx.capture.replay_guards import Guards, Moved


def operators_of(
    graph: fx.Graph, last: fx.Node, before: Collection[fx.Node], outer: int
) -> list[fx.Node]:
    """The operators of a call that was traced behind `last`, in `outer` modules' calls, when there
    were the nodes `before`.

    Raises:
        NotAlike: there are none, or it is more than operators that was added.
    """
    found = []
    node = last.next
    while node is not graph._root:
        found.append(node)
        node = node.next
    added = [node for node in graph.nodes if node not in before and node.op != "placeholder"]
    if not found or added != found:
        raise NotAlike("something was put in front of the layer's operators")
    for node in found:
        value = node.meta.get("example_value")
        stack = node.meta.get("nn_module_stack") or {}
        plain = len(stack) > outer and len(node.meta.get("source_fn_stack", ())) == 1
        if node.op not in ("call_function", "call_method") or not plain:
            raise NotAlike(f"{node.name} is not an operator of the layer")
        if value is not None and free_unbacked_symbols(value):
            raise NotAlike(f"{node.name} has a size of its own")
    return found


def inputs_of(
    graph: fx.Graph, operators: Sequence[fx.Node], guards: Guards, before: Collection[fx.Node]
) -> dict[fx.Node, Any]:
    """Graph inputs that are reached through the layer, in order, and their sources.

    Raises:
        NotAlike: one is reached in another way, or something else is read that is not an argument.
    """
    inputs: dict[fx.Node, Any] = {}
    for node in graph.find_nodes(op="placeholder"):
        source = getattr(node.meta.get("grapharg"), "source", None)
        if source is not None and guards.concerns(source):
            if node in before and guards.through_item(source):
                raise NotAlike(f"{source.name} was read before")
            inputs[node] = source
    own = {id(item) for item in (*guards.module.parameters(), *guards.module.buffers())}
    made = set(operators)
    for item in dict.fromkeys(item for node in operators for item in node.all_input_nodes):
        if item in made or item in inputs:
            continue
        if item.op != "placeholder" and item not in before:
            raise NotAlike(f"{item.name} is computed in front of the layer")
        if id(getattr(item.meta.get("grapharg"), "example", None)) in own:
            raise NotAlike(f"{item.name} is the layer's, and something else's")
    return inputs


def input_of(node: fx.Node, source: Any, moved: Moved, stacks: Stacks, tx: Any) -> fx.Node:
    """The graph input of the other layer that is what `node` is of the traced one."""
    if moved.common(source) is not None:
        return node
    value = moved.now(source)
    if not isinstance(value, Tensor) or not moved.is_new(value, source):
        raise NotAlike(f"{source.name} is also something else")
    outer = tx.nn_module_stack
    try:
        tx.nn_module_stack = stacks.of(node)
        new = VariableBuilder(tx, moved.source(source))(value).as_proxy().node
    finally:
        tx.nn_module_stack = outer
    if not same_layout(node.meta["example_value"], new.meta["example_value"]):
        raise NotAlike(f"{source.name} is laid out in another way")
    assert isinstance(new, fx.Node)
    return new
