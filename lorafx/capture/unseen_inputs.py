"""Inputs that nothing but stamps take, which AOTAutograd does not see.

    of Dynamo's     f(x, W0, W1, W2):  h1 = layer(x; W0); h2 = stamp(h1, W1); h3 = stamp(h2, W2)
    traced          f(x, W0):          h1 = layer(x; W0); h2 = stamp(h1); h3 = stamp(h2)
    afterwards      W1 and W2 are inputs again, in their places, and operands of their layers

AOTAutograd wraps each input a dozen times, at 4 ms in all, and that was a third of what it took for
32 layers. What stands for a layer reads nothing, so its weights and banks need not be there: the
graph that comes out is the one that they would have been traced in. Of inputs that share memory all
are left out, or none: AOTAutograd looks at what shares some. What is written into is not left out:
it is AOTAutograd that copies results back.

In a call the inputs go around AOTAutograd's own part:

    arguments → those that were traced → AOTAutograd's part → all of them in order → the graph
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._functorch._aot_autograd.descriptors import InputMutationAOTOutput, PlainAOTInput
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lorafx.capture.stamp_layers import is_plain
from lorafx.capture.stamps import STAMP, Folded, NotUnfolded
from lorafx.captured_frame import fake_mode, traced_metadata
from lorafx.kernels.ops.stamp_op import Layout, without_data
from lorafx.model.module_graph import storage_key


@dataclass(frozen=True)
class Order:
    """Positions among the arguments of a call: of inputs that were traced, and of the others."""

    seen: tuple[int, ...]
    unseen: tuple[int, ...]


def around(
    order: Order | None, compiled: Callable[..., Any]
) -> tuple[Callable[..., Any], Callable[[Callable[..., Any]], Callable[..., Any]]]:
    """The graph `compiled`, which takes all arguments, as AOTAutograd is to call it, in the boxed
    convention; and what makes of AOTAutograd's function one that takes all arguments."""
    if order is None:
        return compiled, lambda wrapped: wrapped
    local = threading.local()
    among = {position: place for place, position in enumerate((*order.seen, *order.unseen))}
    in_order = _items([among[position] for position in range(len(among))])
    seen, unseen = _items(order.seen), _items(order.unseen)

    def inner(arguments: list[Any]) -> Any:
        whole = list(in_order((*arguments, *local.unseen)))
        arguments.clear()
        local.unseen = ()
        return compiled(whole)

    inner._boxed_call = True  # type: ignore[attr-defined]

    def outer(wrapped: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            local.unseen = unseen(arguments)
            return wrapped(*seen(arguments))

        return run

    return inner, outer


def _items(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    if len(positions) > 1:
        return operator.itemgetter(*positions)
    return lambda values: tuple(values[position] for position in positions)


class UnseenInputs:
    """What was left out of one graph.

    Attributes:
        module: the graph without the inputs, which is traced.
        order: where the inputs belong.
    """

    def __init__(self, module: fx.GraphModule, graph: fx.Graph, order: Order) -> None:
        self.order = order
        nodes = module.graph.find_nodes(op="placeholder")
        self._values = [nodes[position].meta["example_value"] for position in order.unseen]
        #: Positions of inputs that stay where they are between calls.
        self._fixed = [position for position in order.unseen if _is_fixed(nodes[position])]
        places = {nodes[position]: place for place, position in enumerate(order.unseen)}
        #: By the keys of stamps which input each operand is, and None for those that are traced.
        self._operands = {
            node.args[1]: [places.get(value) for value in _operands(node)]
            for node in module.graph.find_nodes(op="call_function", target=STAMP)
        }
        self.module = fx.GraphModule(module, graph)
        for name, value in vars(module).items():  # what Dynamo has noted for AOTAutograd
            vars(self.module).setdefault(name, value)
        self.module.meta = module.meta

    def put_back(self, graph: fx.Graph, inputs: Sequence[Any]) -> list[Any]:
        """Give what AOTAutograd has traced all inputs again, and its stamps all operands, in place.
        Returns the values of all inputs, of which `inputs` are those that were traced.

        Raises:
            NotUnfolded: the inputs are not those that were expected.
        """
        order, nodes = self.order, graph.find_nodes(op="placeholder")
        mode = fake_mode()
        if mode is None or len(inputs) != len(nodes) or len(nodes) != len(order.seen):
            raise NotUnfolded("AOTAutograd has other inputs than it was given")
        for place, node in enumerate(nodes):
            if node.meta.get("desc") != PlainAOTInput(place):
                raise NotUnfolded(f"{node.name} is not an input as it was given")
            node.meta["desc"] = PlainAOTInput(order.seen[place])
        output = graph.output_node()
        output.meta["desc"] = [self._written(desc) for desc in output.meta["desc"]]
        values = dict(zip(order.seen, inputs, strict=True))
        values |= zip(order.unseen, self._made(mode), strict=True)
        at = dict(zip(order.seen, nodes, strict=True))
        for position in order.unseen:
            after = graph.inserting_after(at[position - 1]) if position else None
            with after or graph.inserting_before(next(iter(graph.nodes))):
                at[position] = node = graph.placeholder(f"unseen_{position}")
            node.meta.update(val=values[position], desc=PlainAOTInput(position))
        made = [at[position] for position in order.unseen]
        for call in graph.find_nodes(op="call_function", target=STAMP):
            given = _operands(call)
            traced = iter(given)
            operands = self._operands[call.args[1]]
            if operands.count(None) != len(given):
                raise NotUnfolded("a stamp has other operands than it was given")
            call.update_arg(0, [next(traced) if o is None else made[o] for o in operands])
        return [values[position] for position in range(len(values))]

    def _made(self, mode: FakeTensorMode) -> list[Any]:
        """Values of the inputs that were left out, which share memory as they do."""
        first: dict[int, tuple[Any, FakeTensor]] = {}
        made: dict[int, FakeTensor] = {}
        for place in sorted(
            range(len(self._values)), key=lambda p: self._values[p].storage_offset()
        ):
            value = self._values[place]
            key = storage_key(value)
            if key in first:
                made[place] = without_data(value, *first[key])
            else:
                made[place] = Layout.of(value).empty(mode)
                first[key] = value, made[place]
        return [made[place] for place in range(len(made))]

    def _written(self, desc: Any) -> Any:
        """Which result one of AOTAutograd's is, now that inputs are in other places."""
        if not isinstance(desc, InputMutationAOTOutput):
            return desc
        if not isinstance(desc.mutated_input, PlainAOTInput):
            raise NotUnfolded("something is written into that is no input")
        return replace(desc, mutated_input=PlainAOTInput(self.order.seen[desc.mutated_input.idx]))

    @contextmanager
    def fixed_inputs_told(self) -> Iterator[None]:
        """Inside, Inductor is told which of all inputs stay where they are."""
        metadata = traced_metadata()
        before = metadata.static_input_indices
        seen = [self.order.seen[place] for place in before]
        metadata.static_input_indices = sorted([*seen, *self._fixed])
        try:
            yield
        finally:
            metadata.static_input_indices = before


def leave_out(folded: Folded) -> UnseenInputs | None:
    """The graph whose layers are stamps without the inputs that these alone take; None where that
    are none."""
    nodes = folded.module.graph.find_nodes(op="placeholder")
    sharing: dict[int, list[fx.Node]] = {}
    for node in nodes:
        if is_plain(value := node.meta.get("example_value")):
            sharing.setdefault(storage_key(value), []).append(node)
    unseen = {node for items in sharing.values() if _are_left_out(items) for node in items}
    if not unseen:
        return None
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in folded.module.graph.nodes:
        if node in unseen:
            continue
        if node.target is STAMP:
            given = [copied[value] for value in _operands(node) if value not in unseen]
            copied[node] = graph.call_function(STAMP, (given, node.args[1]))
            copied[node].meta = dict(node.meta)
        else:
            copied[node] = graph.node_copy(node, copied.__getitem__)
        for name in vars(node).keys() - vars(copied[node]).keys():
            setattr(copied[node], name, getattr(node, name))
    order = Order(
        tuple(position for position, node in enumerate(nodes) if node not in unseen),
        tuple(position for position, node in enumerate(nodes) if node in unseen),
    )
    return UnseenInputs(folded.module, graph, order)


def _are_left_out(nodes: Sequence[fx.Node]) -> bool:
    """Whether all inputs in one memory are taken by stamps alone, behind their first operand, which
    tells them where they are traced."""
    values = [node.meta["example_value"] for node in nodes]
    offsets = [value.storage_offset() for value in values]
    if not all(isinstance(offset, int) for offset in offsets) or min(offsets) != 0:
        return False
    if len({value.dtype for value in values}) > 1:
        return False
    if any(value.is_conj() or value.is_neg() for value in values):
        return False
    if torch.is_grad_enabled() and any(value.requires_grad for value in values):
        return False
    users = [(node, user) for node in nodes for user in node.users]
    return all(user.target is STAMP and _operands(user)[0] is not node for node, user in users)


def _operands(stamp: fx.Node) -> list[fx.Node]:
    operands: Any = stamp.args[0]
    return operands


def _is_fixed(node: fx.Node) -> bool:
    """Whether Dynamo has found a parameter or buffer."""
    found = node.meta.get("tensor_dict") or {}
    return bool(found.get("_dynamo_static_input_type"))
