"""Repeated layers are compiled once and called with their weights and banks.

    h1 = layer(h0; W0, bank0); h2 = layer(h1; W1, bank1); ...
    →   h1 = invoke_subgraph(body, h0, W0, bank0); h2 = invoke_subgraph(body, h1, W1, bank1); ...

Stretches of equal canonical form (lorafx.program.regions) are merged. A body returns fresh tensors
only, since a result that shares an operand's memory would be overwritten with it; views are
recomputed after the call.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from lorafx.op_arguments import is_view
from lorafx.ownership.flow import plain_path
from lorafx.ownership.propagate import ancestors
from lorafx.program.bodies import INVOKE
from lorafx.program.context import Context, Outlined
from lorafx.program.frame import fake_value
from lorafx.program.isomorphism import Stretch
from lorafx.program.regions import is_pure, mutates, regions_of, repeats
from lorafx.torch_internals.graph_parts import FakeTensor, tree_leaves

aten = torch.ops.aten


_SIZES = frozenset({aten.sym_size.int, aten.sym_stride.int})
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)


def is_free(node: fx.Node) -> bool:
    """Whether recomputing the node costs nothing: views, sizes, constants."""
    return node.op == "get_attr" or is_view(node) or isinstance(fake_value(node), _SYMBOLIC)


def hoist_shared(graph: fx.Graph) -> int:
    """Move values without activations that leave their region to the front; return the number."""
    _resolve_sizes(graph)
    invariant = _without_activations(graph)
    leaving: list[fx.Node] = []
    for region in regions_of(graph):
        inside = set(region.nodes)
        leaving += (
            node
            for node in region.nodes
            if node in invariant and any(user not in inside for user in node.users)
        )
    hoisted = {node for node in ancestors(leaving) if node.op != "placeholder"}
    anchor = next(node for node in graph.nodes if node.op != "placeholder")
    for node in [node for node in graph.nodes if node in hoisted]:
        node.meta.pop("nn_module_stack", None)  # it belongs to no region now
        if node is anchor:
            anchor = anchor.next
        else:
            anchor.prepend(node)
    return len(hoisted)


def _resolve_sizes(graph: fx.Graph) -> None:
    """Replace sizes of activations by numbers, or by expressions of size inputs."""
    known: dict[Any, fx.Node] = {}
    anchor = next(node for node in graph.nodes if node.op != "placeholder")
    for node in list(graph.nodes):
        value = fake_value(node)
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            continue
        expr = value.node.expr if isinstance(value, torch.SymInt) else sympy.Integer(value)
        if node.op == "placeholder":
            known.setdefault(expr, node)
        elif node.target in _SIZES:
            with graph.inserting_before(anchor):
                size = _size(graph, expr, known)
            if size is None:
                continue
            for user in list(node.users):
                _replace_argument(user, node, size)
            anchor = node.next if node is anchor else anchor
            graph.erase_node(node)


def _size(graph: fx.Graph, expr: Any, known: dict[Any, fx.Node]) -> Any:
    """`expr` as a number or a node, if it is a polynomial in size inputs; None otherwise."""
    if expr.is_Integer:
        return int(expr)
    if expr not in known and isinstance(expr, (sympy.Add, sympy.Mul)):
        target = operator.add if isinstance(expr, sympy.Add) else operator.mul
        parts = [_size(graph, part, known) for part in expr.args]
        if None in parts:
            return None
        total = parts[0]
        for part in parts[1:]:
            node = graph.call_function(target, (total, part))
            values = (fake_value(x) if isinstance(x, fx.Node) else x for x in (total, part))
            node.meta["val"] = target(*values)
            total = node
        known[expr] = total
    return known.get(expr)


def _replace_argument(user: fx.Node, old: fx.Node, new: Any) -> None:
    args = fx.node.map_arg((user.args, user.kwargs), lambda item: new if item is old else item)
    user.args, user.kwargs = args


def _without_activations(graph: fx.Graph) -> set[fx.Node]:
    invariant: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            value = fake_value(node)
            if not (isinstance(value, Tensor) and value.is_floating_point()):
                invariant.add(node)
        elif not is_pure(node):
            if node.op == "call_function" and mutates(node):
                break  # later reads may see changes
        elif all(source in invariant for source in node.all_input_nodes):
            invariant.add(node)
    return invariant


@dataclass(frozen=True)
class Outline:
    """Repeated layers become calls of one body.

    Repeats below `min_nodes` are unchanged: a call costs more, and prevents fusion at its ends.
    """

    name: str = "outline"
    required: bool = False
    min_nodes: int = 32

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        hoist_shared(gm.graph)
        claimed: set[fx.Node] = set()
        replaced: dict[fx.Node, fx.Node] = {}
        edits = 0
        for regions, stretches in repeats(gm, claimed, self.min_nodes):
            members = [_Member.of(stretch) for stretch in stretches]
            if all(member.possible for member in members):
                name = f"{self.name}d_{edits}"
                _outline(gm, ctx, members, name, replaced)
                claimed.update(node for region in regions for node in region.nodes)
                paths = tuple(plain_path(region.path) for region in regions)
                ctx.outlined.append(Outlined(name, paths, len(regions[0].nodes)))
                edits += 1
        return edits


@dataclass(frozen=True)
class _Member:
    """A stretch, indices of nodes whose values leave it, and nodes recomputed after the call."""

    stretch: Stretch
    results: frozenset[int]
    recomputed: tuple[fx.Node, ...]

    @classmethod
    def of(cls, stretch: Stretch) -> _Member:
        position = {node: index for index, node in enumerate(stretch.nodes)}
        leaving = [n for n in stretch.nodes if any(user not in position for user in n.users)]
        reached = ancestors(leaving, lambda n: n in position and is_free(n)).intersection(position)
        free = tuple(n for n in stretch.nodes if n in reached and is_free(n))
        return cls(stretch, frozenset(position[n] for n in reached.difference(free)), free)

    @property
    def possible(self) -> bool:
        nodes = self.stretch.nodes
        return bool(self.results) and all(
            isinstance(fake_value(nodes[index]), torch.Tensor) for index in self.results
        )


class OutlinedBody(fx.GraphModule):
    """An outlined layer. Of fake tensors its results are what the nodes' values say: Inductor asks
    again for each layer, which took a third of the time to compile one more, and its lowerings of
    patterns (int8 products) do not run on tensors."""

    def __call__(self, *args: Any) -> Any:
        if not any(isinstance(item, FakeTensor) for item in args):
            return super().__call__(*args)
        items: Any = self.graph.output_node().args[0]
        values = (item if item is None else fake_value(item) for item in items)
        return tuple(value if value is None else _made_like(value) for value in values)


def _made_like(value: torch.Tensor) -> torch.Tensor:
    return value.new_empty_strided(value.size(), value.stride())


def _outline(
    gm: fx.GraphModule,
    ctx: Context,
    members: Sequence[_Member],
    name: str,
    replaced: dict[fx.Node, fx.Node],
) -> None:
    first = members[0].stretch
    results = sorted(frozenset().union(*(member.results for member in members)))
    sizes = _size_inputs(gm.graph, first)
    inputs = [replaced.get(node, node) for node in first.operands]
    body, inside = _make_body(gm, first.nodes, [*inputs, *sizes], results)
    setattr(gm, name, body)
    with gm.graph.inserting_before(first.nodes[0]):
        attribute = gm.graph.get_attr(name)
    for member in members:
        operands = [replaced.get(node, node) for node in member.stretch.operands]
        call = _call_body(gm.graph, member, (attribute, name, *operands, *sizes), results, replaced)
        for node, twin in zip(member.stretch.nodes, first.nodes, strict=True):
            if node in ctx.states:
                ctx.homes[node] = (call, inside[twin])


def _size_inputs(graph: fx.Graph, stretch: Stretch) -> list[fx.Node]:
    needed = set()
    for node in (*stretch.nodes, *stretch.operands):
        for value in tree_leaves(fake_value(node)):
            sizes = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)
            for size in sizes:
                if isinstance(size, torch.SymInt):
                    needed |= size.node.expr.free_symbols
    inputs: dict[sympy.Symbol, list[fx.Node]] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = fake_value(node)
        if isinstance(value, torch.SymInt) and value.node.expr in needed:
            inputs.setdefault(value.node.expr, []).append(node)
    # The lengths of all layers' caches may share a symbol, but Inductor identifies inputs by their
    # original symbols: only the input that had this symbol originally is passed.
    passed: list[fx.Node] = []
    for symbol, nodes in inputs.items():
        originals = [node for node in nodes if fake_value(node).node._expr == symbol]
        passed += originals[:1] or nodes
    return [node for node in passed if node not in stretch.operands]


def _make_body(
    gm: fx.GraphModule,
    nodes: Sequence[fx.Node],
    operands: Sequence[fx.Node],
    results: Sequence[int],
) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    graph = fx.Graph()
    inside: dict[fx.Node, fx.Node] = {}
    for node in operands:
        inside[node] = graph.placeholder(node.name)
        inside[node].meta["val"] = fake_value(node)
    for node in nodes:
        inside[node] = graph.node_copy(node, inside.__getitem__)
    graph.output(tuple(inside[nodes[index]] for index in results))
    return OutlinedBody(gm, graph), inside


def _call_body(
    graph: fx.Graph,
    member: _Member,
    arguments: tuple[Any, ...],
    results: Sequence[int],
    replaced: dict[fx.Node, fx.Node],
) -> fx.Node:
    nodes = member.stretch.nodes
    inside = set(nodes)
    with graph.inserting_before(nodes[0]):
        call = graph.call_function(INVOKE, arguments)
        call.meta["val"] = tuple(fake_value(nodes[index]) for index in results)
        new: dict[fx.Node, fx.Node] = {}
        for number, index in enumerate(results):
            if index in member.results:
                item = graph.call_function(operator.getitem, (call, number))
                item.meta["val"] = fake_value(nodes[index])
                new[nodes[index]] = item
        for node in member.recomputed:
            new[node] = graph.node_copy(node, lambda source: new.get(source, source))
    for node, item in new.items():
        node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in inside)
    replaced.update(new)
    for node in reversed(nodes):
        graph.erase_node(node)
    return call
