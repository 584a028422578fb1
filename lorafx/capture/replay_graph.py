"""Operators and inputs of a layer that Dynamo traces, and those of one that is replayed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.source import TensorPropertySource
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.builder import VariableBuilder
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from lorafx.capture.replay_arguments import NotAlike, same_layout
from lorafx.capture.replay_calls import Stacks
from lorafx.capture.replay_guards import Guards, Moved
from lorafx.capture.replay_sizes import Renamed


class InputBuilder(VariableBuilder):
    """Dynamo's own, which for each value makes four classes to compare with, and looks at the type
    first."""

    def _wrap(self, value: Any) -> VariableTracker:
        wrap = self._type_dispatch().get(type(value))
        return super()._wrap(value) if wrap is None else wrap(self, value)


#: What users tell Dynamo of a tensor's sizes.
_MARKS = (
    "_dynamo_dynamic_indices",
    "_dynamo_dynamic_range",
    "_dynamo_static_indices",
    "_dynamo_unbacked_indices",
    "_dynamo_weak_dynamic_indices",
)


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


def moved_inputs(
    inputs: Mapping[fx.Node, Any], moved: Moved, stacks: Stacks, sizes: Renamed, tx: Any
) -> dict[fx.Node, fx.Node]:
    """By the graph inputs that the traced layer has for itself those of the other one.

    Raises:
        NotAlike: they are not alike.
    """
    found: dict[fx.Node, fx.Node] = {}
    rest: dict[fx.Node, Any] = {}
    for source in inputs.values():
        if not isinstance(source, TensorPropertySource) and moved.common(source) is None:
            _check_input(source, moved)
    sizes.check(moved)
    tracer = tx.output.root_tracer
    with _one_stack_trace(tracer) as trace, sizes.settled(moved.source):
        for node, source in inputs.items():
            if moved.common(source) is not None:
                found[node] = node
            elif isinstance(source, TensorPropertySource):  # a size, which comes with its tensor
                if not sizes.is_settled(node):
                    rest[node] = moved.source(source)
            else:
                found[node] = _input(node, source, moved, stacks, sizes, tx)
                trace.append(found[node].meta.get("stack_trace"))
    if rest:
        wanted = set(rest.values())
        known: dict[Any, fx.Node] = {}
        # What came with the other layer's tensors is among the last.
        for node in reversed(tx.output.graph.find_nodes(op="placeholder", sort=False)):
            source = getattr(node.meta.get("grapharg"), "source", None)
            if source in wanted:
                known.setdefault(source, node)
                if len(known) == len(wanted):
                    break
        for node, source in rest.items():
            if source not in known:
                raise NotAlike(f"{source.name} is no input")
            found[node] = known[source]
    sizes.end(moved.source)
    return found


@contextmanager
def _one_stack_trace(tracer: Any) -> Iterator[list[str | None]]:
    """Inside, nodes are added at one place of the code: the first one's stack, as text, is that of
    all of them. Dynamo writes it for each, in 0.1 ms."""
    known: list[str | None] = []
    preserve = tracer._maybe_preserve_original_meta

    def preserved(tx: Any, node: fx.Node) -> None:
        preserve(tx, node)
        if known and known[0] is not None:
            node.meta.setdefault("stack_trace", known[0])

    tracer._maybe_preserve_original_meta = preserved
    try:
        yield known
    finally:
        del tracer._maybe_preserve_original_meta


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_input(source: Any, moved: Moved) -> None:
    """Raise NotAlike where the other layer has no input of its own at this source, or it is marked
    in another way."""
    value, before = moved.now(source), moved.before(source)
    if not _is_number(value) and not (isinstance(value, Tensor) and moved.is_new(value, source)):
        raise NotAlike(f"{source.name} is also something else")
    if any(getattr(value, name, None) != getattr(before, name, None) for name in _MARKS):
        raise NotAlike(f"{source.name} is marked in another way")


def _input(
    node: fx.Node, source: Any, moved: Moved, stacks: Stacks, sizes: Renamed, tx: Any
) -> fx.Node:
    value = moved.now(source)
    number = _is_number(value)
    if not number and not moved.is_new(value, source):
        raise NotAlike(f"{source.name} is also another input")
    outer = tx.nn_module_stack
    try:
        tx.nn_module_stack = stacks.of(node)
        variable = InputBuilder(tx, moved.source(source))(value)
    finally:
        tx.nn_module_stack = outer
    if not isinstance(variable, SymNodeVariable if number else TensorVariable):
        raise NotAlike(f"{source.name} is no input")
    new = variable.as_proxy().node
    if number:  # Dynamo notes the calls that it looks at, which have not been made
        new.meta["nn_module_stack"] = stacks.of(node)
    one, other = node.meta["example_value"], new.meta["example_value"]
    if not number and not same_layout(one, other, sizes=False):
        raise NotAlike(f"{source.name} is laid out in another way")
    sizes.pair(one, other)
    assert isinstance(new, fx.Node)
    return new


def _is_size_input(node: fx.Node) -> bool:
    return node.op == "placeholder" and isinstance(node.meta.get("example_value"), torch.SymInt)


def bound(node: fx.Node, tracer: Any) -> fx.Node:
    """The input that stands for the size that `node` is, as much as is known of it now."""
    proxy = tracer.bound_symbols.get(node.meta["example_value"].node.expr)
    return proxy.node if isinstance(proxy, fx.Proxy) else node


def sizes_read(operators: Iterable[fx.Node], tracer: Any) -> set[fx.Node]:
    """The inputs among what operators take that are sizes, which Dynamo finds by their symbols."""
    taken = {item for node in operators for item in node.all_input_nodes}
    return {item for item in taken if _is_size_input(item) and bound(item, tracer) is item}
